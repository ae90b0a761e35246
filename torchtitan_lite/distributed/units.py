"""Modules by the groups of names in a plan."""

from collections.abc import Iterator

from torch import nn


def unit_modules(model: nn.Module, units: tuple[tuple[str, ...], ...]) -> Iterator[list[nn.Module]]:
    """The modules of each unit that `model` has; a unit `layers.*` gives a group for each child of `layers`.

    A pipeline stage has some of them: the others are None, or absent from their container.
    """
    for unit in units:
        if len(unit) == 1 and unit[0].endswith(".*"):
            yield from ([child] for child in model.get_submodule(unit[0][:-2]).children())
        elif modules := [module for name in unit if (module := getattr_path(model, name)) is not None]:
            yield modules


def getattr_path(model: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in name.split("."):
        module = getattr(module, part, None)
    return module
