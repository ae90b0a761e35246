"""torch.compile, a graph for each kind of block."""

from torch import nn

from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.units import unit_modules


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile the blocks of `model` in place: the modules that repeat, so that one graph serves them all."""
    for pattern in (unit[0] for unit in plan.fsdp_units if unit[0].endswith(".*")):
        for (block,) in unit_modules(model, ((pattern,),)):
            block.compile(backend=backend, fullgraph=True)
