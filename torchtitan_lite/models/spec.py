"""What a model family is to the rest of the system: a table of sizes and a few functions.

Importing a family's SPEC imports no torch; only `build` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torchtitan_lite.distributed.plans import ParallelPlan

if TYPE_CHECKING:
    from torch import nn


class ModelArgs(Protocol):
    """Shape of a model; any frozen dataclass with these.

    `dim`: width of the hidden states that pipeline stages hand on.
    `vocab_size`, `max_seq_len`: tokens. `parameter_count()`: elements of all parameters, tied ones once.
    `flops_by_module(seq_len)`: FLOPs of forward and backward for a token of a sequence of that length (6N + causal
    attention, no recomputation), by top-level module in the order of the forward pass (`layers.3` for a child of a
    container); between any two of them a pipeline may cut. A model whose plan has experts also has
    `active_parameter_count()`: elements that one token meets, and its FLOPs are theirs.
    """

    @property
    def dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    def parameter_count(self) -> int: ...
    def flops_by_module(self, seq_len: int) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Init:
    """First values of a parameter: `mean` plus a normal of `std`, cut off at `cutoff` standard deviations."""

    std: float = 0.0
    mean: float = 0.0
    cutoff: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A model family. `build` makes the module on the current device (meta in a run), mapping (tokens int64
    [batch, seq], positions int64 [seq] or None, mask or None) to logits [batch, seq, vocab]; `initial` gives the Init
    of a parameter by its name."""

    name: str
    flavors: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    initial: Callable[[str, Any], Init]
    plan: Callable[[Any], ParallelPlan]
