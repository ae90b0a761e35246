"""How tokens reach their experts and come back: sorted where all experts are here, by all-to-all where ranks share
them.

A dispatch is a module without parameters: another way (DeepEP's kernels, say) is another module with its forward.

Shapes: N tokens of this rank, D width, K choices of a token, E experts of the model, R rows: choices sorted by expert.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from torchtitan_lite.distributed.collectives import exchange, finish_rows, start_rows
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.distributed.units import matches

# Rows [R, D] sorted by the experts that this rank holds, and where each expert's rows end (int32), to rows [R, D].
# Rows past the last end come back as zeros.
Compute = Callable[[Tensor, Tensor], Tensor]
# Work that needs no expert, to be done while tokens travel.
Beside = Callable[[], None]


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh, plan: ExpertPlan, *, halves: bool) -> None:
    """Share the experts of `model` (on meta) in place over the one axis of `mesh`, each whole on one rank.

    halves: moe.overlap_halves.
    """
    for name, module in list(model.named_modules()):
        if matches(name, plan.moe):
            experts = module.get_submodule("experts")
            for key, parameter in list(experts.named_parameters()):
                rows = parameter.chunk(mesh.size())[mesh.get_local_rank()]
                shard = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
                experts.register_parameter(key, nn.Parameter(shard))
            experts.set_submodule("dispatch", AllToAll(mesh.get_group(), plan.num_experts, halves=halves))


def local(parameter: Tensor) -> Tensor:
    """A rank's part of a parameter as a plain tensor. What ranks hold copies of has a gradient that sums over them."""
    if not isinstance(parameter, DTensor):
        return parameter
    grads = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=grads)


class Sorted:
    """The choices of some tokens in the order of their experts.

    ends_E: int32, where each expert's rows end; rows past the last are of choices that are dropped.
    """

    def __init__(self, experts_NK: Tensor, num_experts: int) -> None:
        self.copies = experts_NK.shape[1]
        ordered_R, self.order_R = experts_NK.flatten().sort(stable=True)
        self.back_R = _inverse(self.order_R)
        every = torch.arange(num_experts, device=ordered_R.device)
        self.ends_E = torch.searchsorted(ordered_R, every, right=True, out_int32=True)

    def rows(self, x_ND: Tensor) -> Tensor:
        """[R, D]: each token once for each of its choices."""
        return _permuted(x_ND, self.order_R // self.copies, self.back_R, self.copies)

    def sums(self, rows_RD: Tensor, weights_NK: Tensor) -> Tensor:
        """[N, 1, D]: what the experts made of each token, weighed."""
        out_NKD = _permuted(rows_RD, self.back_R, self.order_R).unflatten(0, (-1, self.copies))
        return torch.bmm(weights_NK.to(out_NKD.dtype)[:, None], out_NKD)


class Local(nn.Module):
    """Dispatch where all experts are on this rank. No host sync."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, compute: Compute, beside: Beside) -> Tensor:
        """The weighed sums of what experts make of each token, [N, 1, D]; does what stands `beside`.

        experts_NK: int64, num_experts for a choice that is dropped.
        """
        chosen = Sorted(experts_NK, self.num_experts)
        beside()
        return chosen.sums(compute(chosen.rows(x_ND), chosen.ends_E), weights_NK)


class AllToAll(nn.Module):
    """Dispatch between the ranks of `group`, of which each holds as many experts, in rank order; see Local.

    Splits are as uneven as the choices. Their sizes must be known to the host: one wait for the device a layer.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, halves: bool) -> None:
        super().__init__()
        self.group, self.num_experts, self.parts = group, num_experts, 2 if halves else 1

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, compute: Compute, beside: Beside) -> Tensor:
        parts = [Sorted(part, self.num_experts) for part in experts_NK.tensor_split(self.parts)]
        sizes = _Sizes(parts, self.group)
        flights = []
        for part, x, send, receive in zip(
            parts, x_ND.tensor_split(self.parts), sizes.sent, sizes.received, strict=True
        ):
            # Sorted by expert is sorted by rank; dropped choices, at the end, stay here.
            flights.append(start_rows(part.rows(x)[: sum(send)], send, receive, self.group))
        beside()
        for index, flight in enumerate(flights):
            out = self._computed(finish_rows(flight), sizes.own[index], compute)
            flights[index] = start_rows(out, flight.receive, flight.send, self.group)
        sums = []
        for part, weights, flight in zip(parts, weights_NK.tensor_split(self.parts), flights, strict=True):
            rows = finish_rows(flight)
            dropped = rows.new_zeros((len(part.order_R) - len(rows), rows.shape[1]))
            sums.append(part.sums(torch.cat((rows, dropped)) if len(dropped) else rows, weights))
        return torch.cat(sums)

    def _computed(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
        """Rows as they came, sorted by rank and then by expert, through this rank's experts; in the same order.

        counts: int64 [ranks, own experts].
        """
        experts = torch.arange(counts.shape[1], device=rows.device).repeat(counts.shape[0])
        expert_R = experts.repeat_interleave(counts.flatten(), output_size=len(rows))
        order = expert_R.argsort(stable=True)
        back = _inverse(order)
        out = compute(_permuted(rows, order, back), counts.sum(0).cumsum(0, dtype=torch.int32))
        return _permuted(out, back, order)


class _Sizes:
    """How many rows go between this rank and each other one, for each part of its tokens.

    sent, received: lists of ints, an entry a rank. own: int64 [ranks, own experts] on the device.
    """

    def __init__(self, parts: list[Sorted], group: dist.ProcessGroup) -> None:
        ends_PE = torch.stack([part.ends_E for part in parts]).long()
        counts_PE = ends_PE.diff(dim=1, prepend=torch.zeros_like(ends_PE[:, :1]))
        sent_GPE = counts_PE.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
        received_GPE = exchange(sent_GPE, group)
        totals = torch.stack((sent_GPE, received_GPE)).sum(-1).transpose(1, 2).tolist()
        self.sent: list[list[int]] = totals[0]
        self.received: list[list[int]] = totals[1]
        self.own = received_GPE.unbind(1)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _permuted(x: Tensor, index: Tensor, back: Tensor, copies: int = 1) -> Tensor:
    """x[index], where index holds every row of x `copies` times, and back says where, row after row."""
    return _Permuted.apply(x, index, back, copies)  # type: ignore[no-any-return]


class _Permuted(torch.autograd.Function):
    """Its gradient is gathered, not scattered: no atomic sums, and the same order of them on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        rows = grad.index_select(0, back)
        return (rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1)), None, None, None
