"""torch.compile, a graph for each kind of block."""

from torch import nn

from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.units import matches, unit_modules


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile the blocks of `model` in place: the modules that repeat, so that one graph serves them all.

    Of a block with a mixture of experts its other modules: how many tokens an expert has is no part of a graph.
    """
    mixtures = {module for name, module in model.named_modules() if plan.experts and matches(name, plan.experts.moe)}
    for pattern in (unit[0] for unit in plan.fsdp_units if unit[0].endswith(".*")):
        for (block,) in unit_modules(model, ((pattern,),)):
            children = list(block.children())
            for part in [block] if mixtures.isdisjoint(children) else [c for c in children if c not in mixtures]:
                part.compile(backend=backend, fullgraph=True)
