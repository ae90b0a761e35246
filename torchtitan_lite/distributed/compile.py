"""torch.compile, a graph for each kind of block."""

from typing import Any

from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.tensor_parallel import style_of
from torchtitan_lite.distributed.units import unit_modules


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile the blocks of `model` in place: the modules that repeat, so that one graph serves them all."""
    for pattern in (unit[0] for unit in plan.fsdp_units if unit[0].endswith(".*")):
        for (block,) in unit_modules(model, ((pattern,),)):
            block.compile(backend=backend, fullgraph=True)
    for name, module in model.named_modules():
        if plan.tensor is not None and style_of(name, plan.tensor.styles) == "embedding":
            module.register_forward_hook(_settle)


def _settle(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """What tensor parallelism's embedding hands on is a collective that may still run. A compiled block that takes it
    as it is, or as its wait() gives it, loses the embedding's gradient without an error; the result of an operation
    on it is a plain tensor."""
    return output + 0 if isinstance(output, AsyncCollectiveTensor) else output
