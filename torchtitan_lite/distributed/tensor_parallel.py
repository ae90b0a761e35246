"""Tensor parallelism with sequence parallelism (Shoeybi et al., arXiv:1909.08053; Korthikanti et al.,
arXiv:2205.05198), on torch's DTensor styles.

Hidden states between modules are split along the sequence. A block gathers them before attention and before the
feed-forward and scatters the sums after each: two all-gathers and two reduce-scatters forward, as many backward.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtitan_lite.distributed.plans import TensorStyle
from torchtitan_lite.distributed.units import matches

SEQUENCE, _VOCABULARY = Shard(1), Shard(-1)


# Split over the vocabulary, as DTensors; gathered on every rank; or none, where the output takes labels and gives a
# loss.
Logits = Literal["split", "gathered", "none"]


def apply_tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    styles: Mapping[str, TensorStyle],
    *,
    logits: Logits,
    instead: Mapping[str, ParallelStyle],
) -> None:
    """Split `model` (on meta) in place over the one axis of `mesh`. On a pipeline stage, patterns of modules that
    other stages hold match nothing.

    styles: as in TensorPlan, the first that matches counts. logits: see Logits. instead: by name, of modules that
    communicate in another way than their style does.
    """
    ways = _styles(logits)
    apart: set[nn.Parameter] = set()
    for name, module in list(model.named_modules()):
        style = style_of(name, styles)
        if style == "apart":
            apart.update(module.parameters())
        elif style:
            parallelize_module(module, mesh, instead.get(name) or ways[style]())
            if style == "embedding":
                module.register_forward_hook(_settle)
    for name, parameter in model.named_parameters():
        # A plain parameter among DTensors would keep the gradient of this rank's part of the sequence.
        if not isinstance(parameter, DTensor) and parameter not in apart:
            raise ValueError(f"{name}: its module has no style in the model's tensor plan")


def _settle(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """What the embedding's style gives is a view of a collective that may still run. A compiled block that takes it as
    it is, or as its wait() gives it, loses the embedding's gradient without an error, and FSDP warns of views. The
    result of an operation on it is a plain tensor."""
    return output + 0


def enable_async(mesh: DeviceMesh) -> None:
    """Let the compiler cut collectives and the matrix products beside them into pieces that overlap; CUDA only."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():  # torch 2.13 calls it needless; torch 2.11 needs it
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def style_of(name: str, styles: Mapping[str, str]) -> str | None:
    """The style of the module of that name, by the first pattern that matches part for part."""
    for pattern, style in styles.items():
        if matches(name, pattern):
            return style
    return None


def _styles(logits: Logits) -> dict[str, Callable[[], ParallelStyle]]:
    """What each TensorStyle but "apart" does to a module's weights and to what goes in and out. Modules "apart" are
    sharded over other axes, to which these ranks are some of many."""
    placement, split = (Replicate() if logits == "gathered" else _VOCABULARY), logits == "split"
    output: dict[str, Callable[[], ParallelStyle]] = {
        "output": lambda: ColwiseParallel(input_layouts=SEQUENCE, output_layouts=placement, use_local_output=not split),
        "tied_output": lambda: PrepareModuleInputOutput(
            input_layouts=(SEQUENCE, None),
            desired_input_layouts=(Replicate(), None),
            output_layouts=_VOCABULARY,
            desired_output_layouts=placement,
            use_local_output=not split,
        ),
    }
    if logits == "none":
        output = {
            "output": _LossOutput,
            "tied_output": lambda: PrepareModuleInput(
                input_layouts=(SEQUENCE, None), desired_input_layouts=(Replicate(), None)
            ),
        }
    return output | {
        # Rows of the table are split over the vocabulary; a rank looks up its own, the sum scatters the sequence.
        "embedding": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        # Each rank norms its part of the sequence; the weight is whole, its gradient is summed.
        "sequence": SequenceParallel,
        # Gathers the sequence once for all the column-split products within.
        "gather": lambda: PrepareModuleInput(input_layouts=SEQUENCE, desired_input_layouts=Replicate()),
        "columns": ColwiseParallel,
        "rows": lambda: RowwiseParallel(output_layouts=SEQUENCE),
        # Norms the heads that a rank holds; as with "sequence", the weight's gradient is summed.
        "head_norm": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
        # Works on its part of the sequence alone.
        "local": lambda: PrepareModuleInput(
            input_layouts=SEQUENCE, desired_input_layouts=SEQUENCE, use_local_output=True
        ),
        # Whole on each rank; the module takes its weights as expert_parallel.local gives them.
        "replicated": _Replicated,
    }


class _LossOutput(ParallelStyle):
    """A matrix that is split by rows in a module that makes a plain loss of the whole sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def split(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            weight = distribute_tensor(part.get_parameter("weight"), mesh, [Shard(0)], src_data_rank=None)
            part.register_parameter("weight", nn.Parameter(weight))

        gathered = PrepareModuleInput(input_layouts=SEQUENCE, desired_input_layouts=Replicate())
        return gathered._apply(distribute_module(module, device_mesh, split), device_mesh)


class _Replicated(ParallelStyle):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)
