"""Modules by the names in a plan."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchtitan_lite.distributed.plans import ParallelPlan


def unit_modules(model: nn.Module, units: tuple[tuple[str, ...], ...]) -> Iterator[list[nn.Module]]:
    """The modules of each unit that `model` has; a unit `layers.*` gives a group for each child of `layers`.

    A pipeline stage has some of them: the others are None, or absent from their container.
    """
    for unit in units:
        if len(unit) == 1 and unit[0].endswith(".*"):
            yield from ([child] for child in model.get_submodule(unit[0][:-2]).children())
        elif modules := [module for name in unit if (module := _at(model, name)) is not None]:
            yield modules


def block_patterns(plan: ParallelPlan) -> list[str]:
    """Patterns of the modules that repeat, as in `layers.*`."""
    return [unit[0] for unit in plan.fsdp_units if unit[0].endswith(".*")]


def require_names(model: nn.Module, plan: ParallelPlan, units: Sequence[str]) -> None:
    """Raise ValueError where a plan or a cut names what the whole `model` does not have: it would be left alone."""
    modules = dict(model.named_modules())
    patterns = {name: "fsdp_units" for unit in plan.fsdp_units for name in unit}
    patterns |= dict.fromkeys(plan.tensor.styles if plan.tensor else (), "tensor styles")
    patterns |= {plan.context.attention: "attention"} if plan.context else {}
    patterns |= {plan.experts.moe: "experts"} if plan.experts else {}
    patterns |= {plan.head: "head"} if plan.head else {}
    patterns |= dict.fromkeys(units if plan.stages else (), "flops_by_module")
    for pattern, where in patterns.items():
        if not any(matches(name, pattern) for name in modules):
            raise ValueError(f"{type(model).__name__} has no module {pattern}, which its {where} name")


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern of plans, part for part."""
    return pattern.count(".") == name.count(".") and fnmatchcase(name, pattern)


def take_out_other_stages(model: nn.Module, units: Sequence[str], stage: Sequence[str]) -> None:
    """Leave of `model` (on meta) the modules of `stage`: the other ones of `units` become None, or go from their
    container. Parameters keep their names."""
    for name in units:
        if name in stage:
            continue
        parent, _, child = name.rpartition(".")
        if parent:
            container = model.get_submodule(parent)
            assert isinstance(container, nn.ModuleDict), f"{parent}: layers of a model with stages are a ModuleDict"
            del container[child]
        else:
            setattr(model, child, None)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in name.split("."):
        module = getattr(module, part, None)
    return module
