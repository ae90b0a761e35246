"""Output matrix and cross-entropy in one, without the logits of more than a part of the tokens.

The gradients of a part are taken while its logits are there, so that nothing is computed twice (as in Liger Kernel,
arXiv:2410.10989): held are those of the hidden states and of the matrix, not [tokens, vocabulary].

Shapes: B batch, L sequence, N = B x L tokens, D width, V vocabulary, a rank's part of it where the loss is parallel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from torchtitan_lite.optim.loss import IGNORE, shifted_softmax

# As loss_and_gradient, which takes what a compiler then fuses: the matrix product's own type in and out.
Part = Callable[[Tensor, Tensor, dist.ProcessGroup | None], tuple[Tensor, Tensor]]


class ChunkedHead(nn.Module):
    """In the place of a model's output matrix: the sum of token losses instead of logits. weight: of a tied model
    None."""

    def __init__(self, weight: nn.Parameter | None, chunks: int, part: Part) -> None:
        super().__init__()
        self.weight, self.chunks, self.part = weight, chunks, part

    def forward(self, x_BLD: Tensor, weight_VD: Tensor | None = None, *, labels: Tensor) -> Tensor:
        """float32 scalar. weight_VD: of a tied model. labels: int64 [B, L] with IGNORE where there is no loss. Under
        tensor parallelism x_BLD is a DTensor, the same on each rank, and the matrix one that is split by rows."""
        weight_VD, group = self.weight if weight_VD is None else weight_VD, None
        assert weight_VD is not None
        if isinstance(x_BLD, DTensor):
            assert isinstance(weight_VD, DTensor)
            group = x_BLD.device_mesh.get_group()
            # Each rank has the gradient that comes through its part of the vocabulary.
            x_BLD, weight_VD = x_BLD.to_local(grad_placements=[Partial()]), weight_VD.to_local()
        return chunked_loss_sum(x_BLD.flatten(0, 1), weight_VD, labels.flatten(), self.chunks, self.part, group)


def apply_chunked_loss(model: nn.Module, head: str, chunks: int, part: Part) -> None:
    """Put a ChunkedHead in the place of the module `head` of `model`; a pipeline stage may have none. part:
    loss_and_gradient, or that compiled."""
    if (output := getattr(model, head)) is not None:
        setattr(model, head, ChunkedHead(getattr(output, "weight", None), chunks, part))


def chunked_loss_sum(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunks: int, part: Part, group: dist.ProcessGroup | None
) -> Tensor:
    """As optim.loss.token_loss_sum of hidden_ND @ weight_VD.T. group: ranks that hold parts of the vocabulary."""
    return _ChunkedLoss.apply(hidden_ND, weight_VD, labels_N, chunks, part, group, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunks: int,
        part: Part,
        group: dist.ProcessGroup | None,
        trains: bool,
    ) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if trains else None
        # float32: a sum over chunks in bfloat16 would round each time.
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains else None
        size = -(-len(labels_N) // chunks)
        for at in range(0, len(labels_N), size):
            hidden = hidden_ND[at : at + size]
            loss, grad = part(F.linear(hidden, weight_VD), labels_N[at : at + size], group)
            total += loss
            if hidden_grad_ND is not None and weight_grad_VD is not None:
                torch.mm(grad, weight_VD, out=hidden_grad_ND[at : at + size])
                _add_product(weight_grad_VD, grad.T, hidden)
        if hidden_grad_ND is not None and weight_grad_VD is not None:
            ctx.save_for_backward(hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        # A scalar keeps its own precision here. Not in place: a backward in halves comes twice.
        return hidden_grad_ND * grad, weight_grad_VD * grad, None, None, None, None, None


def loss_and_gradient(logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The loss (sum over valid tokens) of logits, which it may overwrite, in float32, and its gradient by them in their
    own type."""
    loss, grad_NV, column_N, here_N = shifted_softmax(logits_NV.float(), labels_N, group)
    valid_N = labels_N != IGNORE
    grad_NV.scatter_add_(-1, column_N[:, None], -here_N.to(grad_NV.dtype)[:, None])
    return loss, grad_NV.mul_(valid_N[:, None]).to(logits_NV.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total, float32, += left @ right."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif _sums_within_products(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _sums_within_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of `dtype` to a float32 sum as it computes it: else the product is written, and read
    back to be added, which takes longer than computing it. CUDA's does, but not in every version."""
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())
