"""Data parallelism: FSDP2, HSDP and DDP, all by `fully_shard` on a mesh of (replicas, shards).

DDP is the case of one shard: every rank holds all parameters and gradients are all-reduced. One mechanism
gives all of them the same names, dtypes and reductions (docs/decisions/0003-data-parallel.md).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def apply_data_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    units: tuple[tuple[str, ...], ...],
    *,
    param_dtype: Literal["bfloat16", "float32"],
    reduce_dtype: Literal["float32"],
    reshard_after_forward: bool,
) -> None:
    """Shard `model` in place over the axes dp_replicate (if there) and dp_shard of `mesh`.

    units: as in ParallelPlan. Gradients are summed, not averaged: the loss is already divided by the
    valid tokens of all ranks.
    """
    axes = tuple(axis for axis in ("dp_replicate", "dp_shard") if axis in (mesh.mesh_dim_names or ()))
    # Inputs keep their dtype: activations follow the parameters, and the rotary table stays float32.
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[param_dtype], reduce_dtype=_DTYPES[reduce_dtype], cast_forward_inputs=False
    )
    groups = list(_unit_modules(model, units))
    for index, group in enumerate(groups):
        # The last unit's backward comes right after its forward: freeing it would gather it twice.
        reshard = reshard_after_forward and index < len(groups) - 1
        fully_shard(group, mesh=mesh[axes], mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh[axes], mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum; NCCL gains nothing from one by 1.
            module.set_force_sum_reduction_for_comms(True)


def reduce_across_replicas(model: nn.Module, on: bool) -> None:
    """Whether the coming backward all-reduces over dp_replicate; off until the step's last micro-batch.

    Shards are reduced in every micro-batch: holding them back would keep a full gradient on each rank.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(on)


def _unit_modules(model: nn.Module, units: tuple[tuple[str, ...], ...]) -> Iterator[list[nn.Module]]:
    """The modules of each unit; a pattern with `*` gives one unit for each module that it matches."""
    for unit in units:
        if len(unit) == 1 and unit[0].endswith(".*"):
            yield from ([child] for child in model.get_submodule(unit[0][:-2]).children())
        else:
            yield [model.get_submodule(name) for name in unit]
