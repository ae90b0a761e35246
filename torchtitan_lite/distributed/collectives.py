"""Differentiable collectives on torch's functional ops: the same on CPU and CUDA, and traced by torch.compile.

They make what they send contiguous. The differentiable all-gather of torch.distributed.nn does not, and gives wrong
gradients on gloo for the permuted layouts that attention returns, without an error.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Flight:
    """Rows on their way between ranks: what comes back, not there yet, and what was sent."""

    received: Tensor
    sent: Tensor
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup


def start_rows(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Flight:
    """All-to-all of the rows of x, send[i] of them to rank i, receive[i] from it, in rank order.

    What is computed before finish_rows overlaps with the exchange, and its backward with that of the gradients.
    """
    received, sent = _StartRows.apply(x, send, receive, group)
    return Flight(received, sent, send, receive, group)


def finish_rows(flight: Flight) -> Tensor:
    """Wait for the rows that come back."""
    sizes = (flight.send, flight.receive, flight.group.group_name)
    return _FinishRows.apply(flight.received, flight.sent, sizes)  # type: ignore[no-any-return]


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


class _StartRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return _ops.all_to_all_single(x.contiguous(), receive, send, group.group_name), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: None, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _ops.wait_tensor(grad), None, None, None


class _FinishRows(torch.autograd.Function):
    """Its backward starts the exchange of gradients. They are those of what was sent, in whose place they return: for
    what was received they would have another number of rows."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, sent: Tensor, sizes: tuple[list[int], list[int], str]) -> Tensor:
        ctx.sizes = sizes
        return _ops.wait_tensor(received)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _ops.all_to_all_single(grad.contiguous(), *ctx.sizes), None
