"""Data parallelism: FSDP2, HSDP and DDP, all by `fully_shard` on a mesh of (replicas, shards).

DDP is the case of one shard: every rank holds all parameters and gradients are all-reduced. One mechanism
gives all of them the same names, dtypes and reductions (docs/decisions/0003-data-parallel.md).
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from torchtitan_lite.distributed.gloo import communicate_while_computing
from torchtitan_lite.distributed.units import matches, unit_modules

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What units that are gathered together hold at most, in bytes of parameters in use; the size of DDP's buckets. Of less,
# a collective's own time and ranks' wait for each other in it count for more than what is sent
# (docs/decisions/0014-small-units.md).
_TOGETHER = 25 * 2**20


@dataclass(frozen=True)
class DataPlan:
    """units: as ParallelPlan.fsdp_units; small ones are taken together. param_dtype, reduce_dtype: of parameters in
    use and of gradient sums. reshard_after_forward: free a unit's parameters between its forward and its backward.
    cpu_offload: keep shards, gradients and optimizer state in host memory. moe: pattern of the mixtures, whose experts
    are sharded over axes of their own, and whose routers stay in float32."""

    units: tuple[tuple[str, ...], ...]
    param_dtype: Literal["bfloat16", "float32"]
    reduce_dtype: Literal["float32"]
    reshard_after_forward: bool
    cpu_offload: bool = False
    moe: str | None = None


def apply_data_parallel(model: nn.Module, mesh: DeviceMesh, plan: DataPlan, experts_mesh: DeviceMesh) -> None:
    """Shard `model` in place over the last axis of `mesh`, replicate it over the one before it (if there); its experts
    likewise over `experts_mesh`.

    Gradients are summed, not averaged: the loss is already divided by the valid tokens of all ranks.
    """
    # Inputs keep their dtype: activations follow the parameters, and the rotary table stays float32.
    reduce_dtype = _DTYPES[plan.reduce_dtype]
    policy = MixedPrecisionPolicy(_DTYPES[plan.param_dtype], reduce_dtype, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(torch.float32, reduce_dtype, cast_forward_inputs=False)
    # Pinned memory lets copies overlap; a machine without accelerators has none and copies nothing.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if plan.cpu_offload else OffloadPolicy()
    units = gathered_units(model, plan.units, plan.param_dtype)
    # The last unit's backward comes right after its forward: freeing it would gather it twice.
    kept = {module for part in (units[-1] if units else []) for module in part.modules()}

    def shard(
        modules: nn.Module | list[nn.Module], over: DeviceMesh, dtypes: MixedPrecisionPolicy, **more: Any
    ) -> None:
        first = modules if isinstance(modules, nn.Module) else modules[0]
        free = plan.reshard_after_forward and first not in kept
        fully_shard(modules, mesh=over, mp_policy=dtypes, offload_policy=offload, reshard_after_forward=free, **more)

    # Of mixtures first, wherever the units are: their experts belong to other ranks than what is around them.
    within: set[nn.Module] = set()
    for mixture in (module for name, module in model.named_modules() if plan.moe and matches(name, plan.moe)):
        experts, router = mixture.get_submodule("experts"), mixture.get_submodule("router")
        placement = partial(_expert_shards, ranks=experts_mesh.size(-1))
        shard(experts, experts_mesh, policy, shard_placement_fn=placement)
        shard(router, mesh, exact)
        within |= {experts, router}
    for unit in units:
        shard(unit, mesh, policy)
    shard(model, mesh, policy)
    spread = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in spread:
        module.set_gradient_divide_factor(1.0)
        # gloo has no scaled sum; NCCL gains nothing from one by 1.
        module.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        communicate_while_computing(spread)
    _prefetch([[unit[0], *(inner for part in unit for inner in part.modules() if inner in within)] for unit in units])


def reduce_gradients(model: nn.Module, last: bool, *, whole: bool) -> None:
    """Which reductions the coming backward does; `last`: it is the step's last.

    Replicas are reduced in the last one only. Shards are reduced there too where `whole` gradients may be kept until
    then, as parameters are; else in every micro-batch, for a whole gradient on each rank is what sharding is to avoid.
    """
    if not isinstance(model, FSDPModule):
        return
    # In this order: the first sets what the second then narrows.
    model.set_requires_gradient_sync(last or not whole)
    model.set_requires_all_reduce(last)
    # Kept through the step's backwards too, or the next micro-batch would gather them again.
    model.set_reshard_after_backward(last or not whole)


def gathered_units(model: nn.Module, units: tuple[tuple[str, ...], ...], param_dtype: str) -> list[list[nn.Module]]:
    """What is gathered together, in the order of the forward: a plan's units, small ones joined."""
    return joined(list(unit_modules(model, units)), _TOGETHER // _DTYPES[param_dtype].itemsize)


def joined(units: list[list[nn.Module]], most: int) -> list[list[nn.Module]]:
    """Neighbours among `units` that hold `most` elements at most, as one each; from the end, for the last one is kept
    from its forward to its backward."""
    groups: list[list[nn.Module]] = []
    room = 0
    for unit in reversed(units):
        size = _elements(unit)
        if groups and size <= room:
            groups[-1] = [*unit, *groups[-1]]
        else:
            groups.append(unit)
            room = most
        room -= size
    return groups[::-1]


def _elements(unit: list[nn.Module]) -> int:
    """Of the parameters that are gathered: of what tensor parallelism has left of them."""
    every = (parameter for module in unit for parameter in module.parameters())
    return sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in every)


def _expert_shards(parameter: nn.Parameter, ranks: int) -> Shard:
    """Whole experts to each rank where that comes out even, else rows of each matrix."""
    experts, rows, _ = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    return Shard(1) if experts % ranks and rows % ranks == 0 else Shard(0)


def _prefetch(units: list[list[nn.Module]]) -> None:
    """While a unit computes, the next one's parameters are gathered, in forward and in backward order.

    units: the module that a unit's hooks are on, then the units within it.
    """
    for unit, after in pairwise(units):
        if isinstance(unit[0], FSDPModule) and isinstance(after[0], FSDPModule):
            unit[0].set_modules_to_forward_prefetch(after)  # type: ignore[arg-type]
            after[0].set_modules_to_backward_prefetch(unit)  # type: ignore[arg-type]
