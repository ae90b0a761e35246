"""Two sides held against each other: loss, speed, memory. What may be said, and how sure it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torchtitan_lite.compare.comparable import Ground
from torchtitan_lite.compare.courses import at_equal, ends, pairs_of, whole_of
from torchtitan_lite.compare.runs import Run, tail
from torchtitan_lite.compare.statistics import Interval, block_bootstrap, paired_interval, unpaired_interval

# By how much runs of one recipe differ that one run a side knows nothing of: of times, and of losses.
_ONE_RUN_TIME, _ONE_RUN_LOSS = 0.10, 0.01
_FAR_APART_S = 3600.0


@dataclass(frozen=True)
class Loss:
    """gap: of B's loss over A's: the worst where curves should be equal, else at the end. interval: of the gap at the
    end. envelope: what the gap may be at most, None where curves may differ. steps, gaps: of the first pair. at_equal:
    as courses.at_equal."""

    verdict: str
    told: str
    gap: float | None = None
    interval: list[float] | None = None
    envelope: float | None = None
    steps: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    at_equal: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """ratio: of B's tokens per second over A's, of all ranks. pairs: of each repeat."""

    verdict: str
    told: str
    ratio: float | None = None
    interval: list[float] | None = None
    pairs: list[float] = field(default_factory=list)


def loss_verdict(a: Sequence[Run], b: Sequence[Run], ground: Ground) -> Loss:
    """a, b: runs of each side, at least one; those of one seed are a pair."""
    if not ground.data:
        return Loss("not comparable", f"{'; '.join(ground.told)}: the losses are of different things")
    pairs = pairs_of(a, b)
    whole = whole_of(a), whole_of(b)
    if pairs and ground.limit is not None:
        return _held_to_envelope(pairs, ground, at_equal(*whole))
    return _at_the_end(*whole, ground)


def speed_verdict(a: Sequence[Run], b: Sequence[Run], ground: Ground) -> Speed:
    """From the median step times of runs; those of a pair count together: what slowed both is in nobody's favour."""
    if not ground.hardware:
        return Speed("not comparable", "they ran on different hardware")
    pairs = pairs_of(a, b)
    logs = [math.log(y.tokens_per_s() / x.tokens_per_s()) for x, y in pairs]
    rates = [[math.log(run.tokens_per_s()) for run in side] for side in (a, b)]
    if len(pairs) > 1:
        interval, told = paired_interval(logs).exp(), f"{len(pairs)} repeats, in pairs"
        if any(_apart_s(x, y) > _FAR_APART_S for x, y in pairs):
            told += "; some did not run side by side: what the machine did meanwhile is in the difference"
    elif len(a) > 1 and len(b) > 1:
        interval, told = unpaired_interval(*rates).exp(), f"{len(a)} and {len(b)} runs, not in pairs"
    else:
        interval = _times_of_single_runs(a[0], b[0])
        told = f"one run a side, of which two alike differ by up to {_ONE_RUN_TIME:.0%}: repeats say more"
    verdict = "no difference shown"
    if interval.excludes(1.0):
        verdict = "faster" if interval.middle > 1 else "slower"
    return Speed(verdict, told, interval.middle, interval.bounds(), [math.exp(each) for each in logs])


def memory_of(a: Sequence[Run], b: Sequence[Run]) -> dict[str, float | None]:
    """GiB of the rank that needs most, the middle of each side's runs."""
    x, y = (median(max(run.curve["memory_peak_gib"]) for run in side) for side in (a, b))
    return {"a_gib": x, "b_gib": y, "ratio": y / x if x else None}


def _held_to_envelope(pairs: Sequence[tuple[Run, Run]], ground: Ground, equal: Mapping[str, Any]) -> Loss:
    assert ground.limit is not None
    worst, first = (-1.0, 0.0, 0.0), None
    for x, y in pairs:
        steps, gaps, losses = *(course := _gaps(x, y)), dict(zip(x.steps, x.curve["loss"], strict=True))
        first = first or course
        for step, gap in zip(steps, gaps, strict=True):
            most = ground.limit(step) * abs(losses[step])
            worst = max(worst, (_times(gap, most), gap, most))
    if first is None or not first[0]:
        return Loss("not comparable", "they have no logged step in common")
    times, gap, most = worst
    worst_of = f"the worst gap of {_repeats(len(pairs))} is {gap:.2g}, and may be {most:.2g}"
    told = f"curves should be equal: {ground.why}; {worst_of}"
    return Loss("equal" if times <= 1.0 else "different", told, gap, None, most, *first, equal)


def _at_the_end(a: Sequence[Run], b: Sequence[Run], ground: Ground) -> Loss:
    pairs, equal = pairs_of(a, b), at_equal(a, b)
    _, left, right = ends(a, b, ground.along)
    steps, gaps = _gaps(*pairs[0]) if pairs and ground.along == "steps" else ([], [])
    if bad := [name for name, side in (("A", left), ("B", right)) if not all(map(math.isfinite, side))]:
        return Loss("different", f"the loss of {' and '.join(bad)} is not finite at the end", steps=steps, gaps=gaps)
    least = 0.0
    if len(pairs) > 1:
        by_run = {id(run): loss for run, loss in zip((*a, *b), (*left, *right), strict=True)}
        interval = paired_interval([by_run[id(y)] - by_run[id(x)] for x, y in pairs])
        told = f"{len(pairs)} repeats, each of a seed of its own"
    elif len(a) > 1 and len(b) > 1:
        interval, told = unpaired_interval(left, right), f"{len(a)} and {len(b)} runs, not in pairs"
    else:
        interval, least = _losses_of_single_runs(a[0], b[0], right[0] - left[0], gaps), _ONE_RUN_LOSS * abs(left[0])
        told = f"one run a side, of which two alike differ by up to {_ONE_RUN_LOSS:.0%}: repeats say more"
    at = {"steps": "at the end", "tokens": "at equal tokens", "flops": "at equal FLOPs"}[ground.along]
    verdict = "different" if interval.excludes(0.0) and abs(interval.middle) > least else "no difference shown"
    why = f"curves may differ: {ground.why}; smoothed, {at}, {told}"
    return Loss(verdict, why, interval.middle, interval.bounds(), None, steps, gaps, equal)


def _gaps(x: Run, y: Run) -> tuple[list[int], list[float]]:
    """Steps that both have logged, and y's loss over x's; of losses that are not finite, none where both are alike."""
    left, right = (dict(zip(run.steps, run.curve["loss"], strict=True)) for run in (x, y))
    common = [step for step in left if step in right]
    return common, [0.0 if str(left[step]) == str(right[step]) else right[step] - left[step] for step in common]


def _losses_of_single_runs(x: Run, y: Run, gap: float, gaps: Sequence[float]) -> Interval:
    """Around `gap`. Steps of the same samples go up and down together; else each side goes on its own."""
    if gaps:
        around = block_bootstrap(tail(gaps))
        return Interval(gap, gap + around.low - around.middle, gap + around.high - around.middle)
    own = [block_bootstrap(tail(run.curve["loss"])) for run in (x, y)]
    reach = math.hypot(*(each.high - each.low for each in own)) / 2
    return Interval(gap, gap - reach, gap + reach)


def _times_of_single_runs(x: Run, y: Run) -> Interval:
    """Of the ratio of rates, as wide as both runs' own unrest and what another run might bring."""
    own = [block_bootstrap([math.log(time) for time in run.steady("step_time_s")], of_medians=True) for run in (x, y)]
    reach = math.hypot(*((each.high - each.low) / 2 for each in own), math.log1p(_ONE_RUN_TIME))
    middle = math.log(y.tokens_per_s() / x.tokens_per_s())
    return Interval(middle, middle - reach, middle + reach).exp()


def _apart_s(x: Run, y: Run) -> float:
    if "started" not in x.mark or "started" not in y.mark:
        return math.inf
    return abs(float(x.mark["started"]) - float(y.mark["started"]))


def _times(gap: float, most: float) -> float:
    """How many times what is allowed a gap is; infinite for one where nothing is, and for one that is no number."""
    if math.isnan(gap):
        return math.inf
    return abs(gap) / most if most else math.inf if gap else 0.0


def _repeats(count: int) -> str:
    return "one pair of runs" if count == 1 else f"{count} pairs of runs"
