"""Cross-entropy as a sum: what divides it is the step's business (see trainable)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_lite.distributed.collectives import all_reduce

IGNORE = -100  # label of a position without loss


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid tokens of the cross-entropy in nats: float32 scalar.

    logits [batch, seq, vocab], plain or a DTensor split over the vocabulary; labels int64 [batch, seq] with IGNORE
    where there is no loss.
    """
    if isinstance(logits, DTensor):
        group = logits.device_mesh.get_group()
        return _ShardedCrossEntropy.apply(logits.to_local().flatten(0, 1).float(), labels.flatten(), group)  # type: ignore[no-any-return]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def shifted_softmax(
    logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (sum over valid tokens), the softmax, and of each label its column and whether it is among these.

    logits_NV: float32, of which each rank of `group` holds an equal part of the vocabulary, in rank order; None where
    they are whole. Three numbers a token are communicated: the largest logit, the sum of exponentials, the label's
    logit.
    """
    largest_N = _over(logits_NV.amax(dim=-1), "max", group)
    shifted_NV = logits_NV - largest_N[:, None]
    local_N = labels_N - (0 if group is None else group.rank() * logits_NV.shape[-1])
    here_N = (local_N >= 0) & (local_N < logits_NV.shape[-1])
    column_N = local_N.where(here_N, 0)
    label_logit_N = shifted_NV.gather(-1, column_N[:, None])[:, 0].where(here_N, 0.0)
    exp_NV = shifted_NV.exp_()
    sum_N, label_logit_N = _over(torch.stack((exp_NV.sum(dim=-1), label_logit_N)), "sum", group).unbind(0)
    loss = (sum_N.log() - label_logit_N).where(labels_N != IGNORE, 0.0).sum()
    return loss, exp_NV.div_(sum_N[:, None]), column_N, here_N


def _over(x: Tensor, op: str, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else all_reduce(x, op, group)


class _ShardedCrossEntropy(torch.autograd.Function):
    """As shifted_softmax."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        loss, softmax_NV, column_N, here_N = shifted_softmax(logits_NV, labels_N, group)
        ctx.save_for_backward(softmax_NV, column_N, here_N, labels_N != IGNORE)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax_NV, column_N, here_N, valid_N = ctx.saved_tensors
        # Scaled copy: the saved softmax stays what it is.
        grad_NV = softmax_NV * (grad * valid_N)[:, None]
        grad_NV.scatter_add_(-1, column_N[:, None], -(grad * (here_N & valid_N))[:, None])
        return grad_NV, None, None
