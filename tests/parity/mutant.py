"""What a mutant is, and how one is made and kept."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from tests.parity.runner import Case

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """apply: makes the product wrong within it. bug: in words, for the table. case: the mesh that shows it."""

    apply: Patch
    bug: str
    case: Case


MUTANTS: list[Mutant] = []


def mutant(bug: str, case: Case) -> Callable[[Callable[[], Iterator[None]]], Patch]:
    def register(function: Callable[[], Iterator[None]]) -> Patch:
        apply = contextmanager(function)
        MUTANTS.append(Mutant(apply, bug, case))
        return apply

    return register


def replaced(target: str, make: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """`target` (package.module.name) replaced by make(what stood there)."""
    from pkgutil import resolve_name

    return patch(target, make(resolve_name(target)))


PRODUCT = "torchtitan_lite"
MODEL = f"{PRODUCT}.trainable.TrainableModel"
