"""One clock for all ranks: how far this rank's is from the first one's, and how surely that is known."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_lite.distributed.runtime import from_first_rank
from torchtitan_lite.observability.phases import Clock

_ROUNDS = 16
_BOOT = Path("/proc/sys/kernel/random/boot_id")

Rounds = Sequence[tuple[int, int]]  # when a rank went into each, and when it came out, by its own clock


def shared_clock() -> Clock:
    """This rank's monotonic clock against the first rank's wall clock; collective, a few milliseconds."""
    rounds = []
    for _ in range(_ROUNDS):
        entered = time.monotonic_ns()
        dist.all_reduce(torch.zeros(1))
        rounds.append((entered, time.monotonic_ns()))
    wall = time.time_ns() - time.monotonic_ns()
    machine = _machine()
    first: dict[str, Any] = from_first_rank({"rounds": rounds, "wall": wall, "machine": machine})
    if machine is not None and machine == first["machine"]:
        return Clock(first["wall"], 0)
    ahead, error = ahead_of(rounds, first["rounds"])
    return Clock(first["wall"] - ahead, error)


def ahead_of(own: Rounds, first: Rounds) -> tuple[int, int]:
    """How far the clock of `own` is ahead of that of `first`, and by how much at most that is wrong, in ns.

    Nobody comes out of a round before all have gone in: own[0] <= first[1] + ahead, and first[0] + ahead <= own[1].
    """
    least = max(entered - left for (entered, _), (_, left) in zip(own, first, strict=True))
    most = min(left - entered for (_, left), (entered, _) in zip(own, first, strict=True))
    return (least + most) // 2, (most - least + 1) // 2


def _machine() -> str | None:
    """The same for all processes that share a monotonic clock; None where there is no telling."""
    try:
        return _BOOT.read_text()
    except OSError:
        return None
