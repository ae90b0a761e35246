"""Data parallelism: FSDP2, HSDP and DDP, all by `fully_shard` on a mesh of (replicas, shards).

DDP is the case of one shard: every rank holds all parameters and gradients are all-reduced. One mechanism
gives all of them the same names, dtypes and reductions (docs/decisions/0003-data-parallel.md).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from torchtitan_lite.distributed.units import unit_modules

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class DataPlan:
    """units: as ParallelPlan.fsdp_units. param_dtype, reduce_dtype: of parameters in use and of gradient sums.
    reshard_after_forward: free a unit's parameters between its forward and its backward. cpu_offload: keep shards,
    gradients and optimizer state in host memory."""

    units: tuple[tuple[str, ...], ...]
    param_dtype: Literal["bfloat16", "float32"]
    reduce_dtype: Literal["float32"]
    reshard_after_forward: bool
    cpu_offload: bool = False


def apply_data_parallel(model: nn.Module, mesh: DeviceMesh, plan: DataPlan) -> None:
    """Shard `model` in place over the last axis of `mesh`, replicate it over the one before it (if there).

    Gradients are summed, not averaged: the loss is already divided by the valid tokens of all ranks.
    """
    # Inputs keep their dtype: activations follow the parameters, and the rotary table stays float32.
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[plan.param_dtype], reduce_dtype=_DTYPES[plan.reduce_dtype], cast_forward_inputs=False
    )
    # Pinned memory lets copies overlap; a machine without accelerators has none and copies nothing.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if plan.cpu_offload else OffloadPolicy()
    reshard = plan.reshard_after_forward
    groups = list(unit_modules(model, plan.units))
    for index, group in enumerate(groups):
        # The last unit's backward comes right after its forward: freeing it would gather it twice.
        kept = reshard and index < len(groups) - 1
        fully_shard(group, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=kept)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum; NCCL gains nothing from one by 1.
            module.set_force_sum_reduction_for_comms(True)
    _prefetch([group[0] for group in groups])


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


def _prefetch(units: list[nn.Module]) -> None:
    """While a unit computes, the next one's parameters are gathered, in forward and in backward order."""
    for unit, after in pairwise(units):
        if isinstance(unit, FSDPModule) and isinstance(after, FSDPModule):
            unit.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([unit])
