"""Differentiable collectives on torch's functional ops: the same on CPU and CUDA, and traced by torch.compile.

They make what they send contiguous. The differentiable all-gather of torch.distributed.nn does not, and gives wrong
gradients on gloo for the permuted layouts that attention returns, without an error.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def all_reduce(x: Tensor, op: str, group: dist.ProcessGroup) -> Tensor:
    """`op` ("sum", "max") of x over the ranks of `group`; no gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group.group_name))  # type: ignore[no-any-return]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, *x.shape]: x of each of the n ranks, in order. The gradient is summed over ranks and scattered back."""
    return _Gather.apply(x, group)  # type: ignore[no-any-return]


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: x is [n, ...], a part for each of the n ranks; so is what comes back, a part from each."""
    return _Exchange.apply(x, group)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
        return _ops.wait_tensor(whole).view(group.size(), *x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        own = _ops.reduce_scatter_tensor(grad.contiguous().flatten(0, 1), "sum", group.size(), group.group_name)
        return _ops.wait_tensor(own).view(grad.shape[1:]), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = [1] * group.size()
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), rows, rows, group.group_name))  # type: ignore[no-any-return]
