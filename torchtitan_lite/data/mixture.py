"""Which source the sample at a position comes from, and which of that source's samples it is.

A window is sum(weights) positions in a row, weights[i] of them source i's. Nothing but the position is state: what
earlier windows took of a source is their number times its weight.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from torchtitan_lite.data.order import permute, sample_at

_Slots = tuple[tuple[int, int], ...]  # of each slot of a window: its source, and that source's slots before it


def mixed_sample_at(position: int, samples: Sequence[int], weights: tuple[int, ...], seed: int) -> tuple[int, int]:
    """(source, its sample) at `position` of training's order. samples: how many each source has.

    A seeded permutation deals each window's slots to the sources; each source runs through epochs of its own.
    """
    window, slot = divmod(position, sum(weights))
    source, before = _dealt(window, weights, seed)[slot]
    # Epochs by source: two of one size would go through the same permutation side by side.
    return source, sample_at(window * weights[source] + before, samples[source], f"{seed}/source {source}")


def held_out_sample_at(position: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """(source, its sample) at `position` of the held-out order: sources in turn, each in the order of its files.

    Spread evenly, so that a validation of any length is within a sample or so of the weights.
    """
    window, slot = divmod(position, sum(weights))
    source, before = _spread(weights)[slot]
    return source, window * weights[source] + before


def held_out_samples(samples: Sequence[int], weights: tuple[int, ...]) -> int:
    """Positions of the held-out order until the first source has no more: past them the weights would be others."""
    ends = []
    for source, (count, weight) in enumerate(zip(samples, weights, strict=True)):
        windows, rest = divmod(count, weight)
        ends.append(windows * sum(weights) + _spread(weights).index((source, rest)))
    return min(ends)


@lru_cache(maxsize=4)  # a step goes through its windows in order
def _dealt(window: int, weights: tuple[int, ...], seed: int) -> _Slots:
    owners = [source for source, weight in enumerate(weights) for _ in range(weight)]
    size = len(owners)
    return _counted(owners[permute(slot, size, f"{seed}/window {window}")] for slot in range(size))


@lru_cache(maxsize=4)
def _spread(weights: tuple[int, ...]) -> _Slots:
    middles = sorted(
        ((2 * turn + 1) / (2 * weight), source) for source, weight in enumerate(weights) for turn in range(weight)
    )
    return _counted(source for _, source in middles)


def _counted(sources: Iterable[int]) -> _Slots:
    seen: dict[int, int] = {}
    slots = []
    for source in sources:
        slots.append((source, seen.setdefault(source, 0)))
        seen[source] += 1
    return tuple(slots)
