"""What a model family is to the rest of the system: a table of sizes and a few functions.

Importing a family's SPEC imports no torch; only `build` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


class ModelArgs(Protocol):
    """Shape of a model; any frozen dataclass with these.

    `vocab_size`, `max_seq_len`: tokens. `parameter_count()`: elements of all parameters, tied ones once.
    `flops_per_token(seq_len)`: FLOPs of forward and backward for a token of a sequence of that length
    (6N + causal attention, no recomputation).
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    def parameter_count(self) -> int: ...
    def flops_per_token(self, seq_len: int) -> float: ...


@dataclass(frozen=True)
class Init:
    """First values of a parameter: `mean` plus a normal of `std`, cut off at `cutoff` standard deviations."""

    std: float = 0.0
    mean: float = 0.0
    cutoff: float | None = None


@dataclass(frozen=True)
class ParallelPlan:
    """Where techniques attach, by module name.

    fsdp_units: groups of modules whose parameters are gathered together, in the order of the forward
    pass. `layers.*`, alone in its group, gives a group for each child of `layers`. Parameters of no group
    belong to the model as a whole.
    """

    fsdp_units: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ModelSpec:
    """A model family. `build` makes the module on the current device (meta in a run), mapping tokens
    int64 [batch, seq] to logits [batch, seq, vocab]; `initial` gives the Init of a parameter by its name."""

    name: str
    flavors: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    initial: Callable[[str, Any], Init]
    plan: Callable[[Any], ParallelPlan]
