"""torch.compile, a graph for each kind of block."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from torchtitan_lite.config.techniques import Compile
from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.units import block_patterns, matches, unit_modules

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled_loss(function: _Function, section: Compile) -> _Function:
    """`function`, compiled where the section compiles the loss."""
    if not section.enable or "loss" not in section.components:
        return function
    return torch.compile(function, backend=section.backend, fullgraph=True)  # type: ignore[return-value]


def compiled_so_far() -> dict[str, float]:
    """What this process has compiled: `graphs`, `seconds` that took, and how many of the compiler's pieces came from
    its cache on disk, which earlier runs filled (`reused`, `made`)."""
    from torch._dynamo.utils import calculate_time_spent, counters

    cache = counters["inductor"]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "seconds": calculate_time_spent().get("total_wall_time", 0.0),
        "reused": cache["fxgraph_cache_hit"],
        "made": cache["fxgraph_cache_miss"],
    }


def apply_compile(model: nn.Module, plan: ParallelPlan, section: Compile) -> None:
    """Where the section compiles the model, do so with its blocks, in place: they repeat, and one graph serves all.

    Of a block with a mixture of experts its attention and the shared expert: how many tokens an expert has is no part
    of a graph.
    """
    if not section.enable or "model" not in section.components:
        return
    mixtures = {module for name, module in model.named_modules() if plan.experts and matches(name, plan.experts.moe)}
    for pattern in block_patterns(plan):
        for (block,) in unit_modules(model, ((pattern,),)):
            for part in _parts(block, mixtures):
                part.compile(backend=section.backend, fullgraph=True)


def _parts(block: nn.Module, mixtures: set[nn.Module]) -> Iterator[nn.Module]:
    if mixtures.isdisjoint(block.children()):
        yield block
        return
    for child in block.children():
        if child in mixtures:
            if isinstance(shared := getattr(child, "shared", None), nn.Module):
                yield shared
        elif any(child.children()):  # a norm alone is no graph: torch traces none of its own modules' code by itself
            yield child
