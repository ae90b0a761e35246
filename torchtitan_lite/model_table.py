"""The plan of an assembled model as a table: what was split how, gathered with what, and what else was done to it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from torchtitan_lite.config.techniques import ActivationCheckpoint
from torchtitan_lite.distributed.plans import ParallelPlan, keeps, mixture_styles
from torchtitan_lite.distributed.tensor_parallel import style_of
from torchtitan_lite.distributed.units import block_patterns, matches

_HEAD = ("module", "count", "parameters", "split", "tensor", "fsdp unit", "dtype", "with")
_COUNT, _PARAMETERS = 1, 2  # columns of numbers


@dataclass(frozen=True)
class Row:
    """Modules that are alike, of one pattern of names, as they are on this rank. parameters: of all ranks."""

    module: str
    count: int
    parameters: int
    split: str
    tensor: str
    unit: str
    dtype: str
    extra: str

    def cells(self) -> tuple[str, ...]:
        return (
            *(self.module, str(self.count), f"{self.parameters:,}"),
            *(self.split, self.tensor, self.unit, self.dtype, self.extra),
        )


def told(
    parts: Sequence[nn.Module], plan: ParallelPlan, section: ActivationCheckpoint, stages: Sequence[int], of: int
) -> str:
    """The table of this rank's part of a model, for the log. stages: of a pipeline, which it has of how many; none
    without one."""
    where = [f"stage {', '.join(map(str, stages))} of {of}, counted from 0"] if stages else []
    lines = [*where, *table(model_rows(parts, plan, section))]
    return "\n".join(f"{'' if number else 'plan':<10}{line}" for number, line in enumerate(lines))


def model_rows(parts: Sequence[nn.Module], plan: ParallelPlan, section: ActivationCheckpoint) -> list[Row]:
    """In the order of the model. Read from the modules, not from what was asked for, but for the names of styles and
    of what checkpointing keeps."""
    rows: dict[tuple[str, ...], tuple[int, int]] = {}
    for part in parts:
        for key, parameters in _modules(part, plan, section):
            count, before = rows.get(key, (0, 0))
            rows[key] = (count + 1, before + parameters)
    return [Row(key[0], *numbers, *key[1:]) for key, numbers in rows.items()]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines; columns that hold nothing are left out."""
    body = [row.cells() for row in rows]
    used = [column for column in range(len(_HEAD)) if any(cells[column] for cells in body)]
    width = {column: max(len(cells[column]) for cells in (_HEAD, *body)) for column in used}
    lines = []
    for cells in (_HEAD, *body):
        padded = [f"{cells[c]:>{width[c]}}" if c in (_COUNT, _PARAMETERS) else f"{cells[c]:<{width[c]}}" for c in used]
        lines.append("  ".join(padded).rstrip())
    return lines


def _modules(
    model: nn.Module, plan: ParallelPlan, section: ActivationCheckpoint
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Of each module with parameters of its own: what a row holds but its numbers, and how many parameters."""
    mixture = mixture_styles(plan.experts) if plan.experts else {}
    styles = {**mixture, **(plan.tensor.styles if plan.tensor else {}), **mixture}  # as assembly has them
    blocks, units = block_patterns(plan), _unit_names(model)
    seen: set[Tensor] = set()
    # What a module has of those around it, which come first.
    around: dict[str, tuple[FSDPModule | None, tuple[str, ...]]] = {"": (None, ())}
    for name, module in model.named_modules():
        unit, marks = around[name.rpartition(".")[0] if name else ""]
        unit = module if isinstance(module, FSDPModule) else unit
        if any(matches(name, pattern) for pattern in blocks) and "forward" in vars(module):
            by_operation = keeps(section, int(name.rpartition(".")[2])) == "op"
            marks = (*marks, "recomputed but for products" if by_operation else "recomputed")
        if module._compiled_call_impl is not None:
            marks = (*marks, "compiled")
        around[name] = (unit, marks)
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        seen.update(own)
        if not own:
            continue
        split, on_tensor_axis = _split(own[0])
        style = style_of(name, styles) if on_tensor_axis else None
        extra = ", ".join((*(["float8"] if _is_float8(module) else []), *marks))
        unit_name = "" if unit is None else units[id(fully_shard.state(unit))]  # type: ignore[attr-defined]
        key = (_pattern(name), split, style or "", unit_name, _dtype(own[0], unit), extra)
        yield key, sum(parameter.numel() for parameter in own)


def _is_float8(module: nn.Module) -> bool:
    # By name: what asks for no float8 imports none of it.
    kinds = [type(each).__name__ for each in (module, getattr(module, "swiglu", None))]
    return kinds[0].endswith("Float8Linear") or kinds[1] in ("EmulatedSwiGLU", "ScaledSwiGLU")


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "(model)"


def _unit_names(model: nn.Module) -> dict[int, str]:
    """By the identity of its state: modules that are gathered together share one."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = id(fully_shard.state(module))  # type: ignore[attr-defined]
            names[state] = f"{names[state]} + {_pattern(name)}" if state in names else _pattern(name)
    return names


def _split(parameter: Tensor) -> tuple[str, bool]:
    """Over which axes that are longer than one a parameter lies, and whether the tensor axis is among them."""
    if not isinstance(parameter, DTensor):
        return "whole", False
    mesh = parameter.device_mesh
    told, names = [], mesh.mesh_dim_names or ()
    for name, size, placement in zip(names, mesh.shape, parameter.placements, strict=True):
        if size > 1:
            dim = getattr(placement, "dim", None)
            told.append(f"{name} {size} {'copies' if dim is None else f'on dim {dim}'}")
    return ", ".join(told) or "whole", "tp" in names


def _dtype(parameter: Tensor, unit: FSDPModule | None) -> str:
    kept = str(parameter.dtype).removeprefix("torch.")
    used = None if unit is None else fully_shard.state(unit)._mp_policy.param_dtype  # type: ignore[attr-defined]
    return kept if used in (None, parameter.dtype) else f"{kept} as {str(used).removeprefix('torch.')}"
