"""How far the clocks of two ranks are apart, from when they went into rounds and came out."""

import random
import time
from typing import Any
from unittest.mock import patch

import pytest

from tests.ranks import RankPool
from torchtitan_lite.distributed import clocks
from torchtitan_lite.distributed.clocks import ahead_of, shared_clock


def test_the_truth_lies_within_the_error() -> None:
    for seed in range(50):
        drawn = random.Random(seed)
        ahead, now = drawn.randint(-(10**12), 10**12), 10**15
        own, first = [], []
        for _ in range(16):
            entered = [now + drawn.randint(0, 300_000) for _ in range(2)]
            left = [max(entered) + drawn.randint(1_000, 200_000) for _ in range(2)]
            first.append((entered[0], left[0]))
            own.append((entered[1] + ahead, left[1] + ahead))
            now = max(left)
        found, error = ahead_of(own, first)
        assert abs(found - ahead) <= error < 300_000


def test_a_round_in_which_both_wait_for_no_one_is_exact() -> None:
    assert ahead_of([(105, 110)], [(5, 10)]) == (100, 5)
    assert ahead_of([(105, 110), (200, 201)], [(5, 10), (100, 101)]) == (100, 1)


def _clock(same_machine: bool) -> tuple[int, int]:
    """How far this rank's clock is from the wall's by the shared one, and its error, in ns."""
    with patch.object(clocks, "_machine", clocks._machine if same_machine else lambda: None):
        clock = shared_clock()
    return time.monotonic_ns() + clock.offset_ns - time.time_ns(), clock.error_ns


@pytest.mark.parametrize("same_machine", [True, False])
def test_ranks_of_one_machine_find_that_they_have_one_clock(pool: RankPool, same_machine: bool) -> None:
    for off, error in pool.run(_clock, 3, same_machine):
        assert abs(off) < error + 20_000_000
        assert error == 0 if same_machine else 0 <= error < 50_000_000


@pytest.mark.parametrize("ahead", [-(10**15), 10**15])
def test_a_clock_that_is_ahead_is_taken_back(ahead: int) -> None:
    def first_of(own: dict[str, Any]) -> dict[str, Any]:
        # Of the first rank the wall clock is the same, and its monotonic one is behind by `ahead`.
        rounds = [(entered - ahead, left - ahead) for entered, left in own["rounds"]]
        return {"rounds": rounds, "wall": own["wall"] + ahead, "machine": "another"}

    with patch.object(clocks, "from_first_rank", first_of), patch.object(clocks.dist, "all_reduce"):
        clock = shared_clock()
    assert abs(time.monotonic_ns() + clock.offset_ns - time.time_ns()) <= clock.error_ns + 20_000_000
