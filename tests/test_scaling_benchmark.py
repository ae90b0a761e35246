"""benchmarks/scaling.py without its runs: what theory says of its points, and how growth is fitted."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling


def _of(series: str) -> list[scaling.Point]:
    return [point for point in scaling.POINTS if point.series == series]


def test_growth_is_the_exponent_of_a_power_law_without_points_that_share_cores() -> None:
    assert scaling.growth([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    columns = ("step_s", "theory_s", "above_mib", "theory_mib")
    rows = [{"series": "ranks", "x": x, "oversubscribed": x == 4, **dict.fromkeys(columns, 8 / x)} for x in (1, 2)]
    rows.append({"series": "ranks", "x": 4, "oversubscribed": True, **dict.fromkeys(columns, 8.0)})
    assert scaling.exponents(rows)["ranks"] == pytest.approx(dict.fromkeys(columns, -1))


def test_theory_of_what_grows() -> None:
    counts, lengths, ranks = map(_of, (scaling.ACCUMULATION, scaling.SEQUENCE, scaling.RANKS))
    assert len({scaling.flops(point) for point in counts}) == 1, "the same tokens"
    assert [scaling.plan_of(point).batch.microbatches for point in counts] == [point.x for point in counts]
    kept = [scaling.least_bytes(point)["kept"] * point.x for point in counts]
    assert kept == pytest.approx([kept[0]] * len(kept))
    # Twice the tokens, each with more attention.
    assert all(scaling.flops(long) > 2 * scaling.flops(short) for short, long in pairwise(lengths))
    states = [scaling.least_bytes(point)["optimizer"] * point.ranks for point in ranks]
    assert states == pytest.approx([8 * scaling.SPEC.flavors["384"].parameter_count()] * len(states))
    assert [scaling.flops(point) * point.ranks for point in ranks] == pytest.approx([scaling.flops(ranks[0])] * 3)
