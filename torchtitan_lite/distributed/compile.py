"""torch.compile, a graph for each kind of block."""

from torch import nn

from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.units import block_patterns, matches, unit_modules


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile the blocks of `model` in place: the modules that repeat, so that one graph serves them all.

    Of a block with a mixture of experts its attention: how many tokens an expert has is no part of a graph.
    """
    mixtures = {module for name, module in model.named_modules() if plan.experts and matches(name, plan.experts.moe)}
    for pattern in block_patterns(plan):
        for (block,) in unit_modules(model, ((pattern,),)):
            children = list(block.children())
            if mixtures.isdisjoint(children):
                parts = [block]
            else:  # a norm alone is no graph
                parts = [child for child in children if child not in mixtures and any(child.children())]
            for part in parts:
                part.compile(backend=backend, fullgraph=True)
