"""Two sides held against each other: loss, speed, memory. What may be said, and how sure it is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from torchtitan_lite.compare.comparable import Ground
from torchtitan_lite.compare.courses import at_equal, ends, pairs_of, whole_of
from torchtitan_lite.compare.runs import SMOOTHED_OVER, Run, tail
from torchtitan_lite.compare.statistics import Interval, block_bootstrap, paired_interval, unpaired_interval

# By how much runs of one recipe differ that one run a side knows nothing of: of times, and of losses.
_ONE_RUN_TIME, _ONE_RUN_LOSS = 0.10, 0.01
# Repeats of which Student's interval says next to nothing; what one run a side shows, they show too.
_FEW = 4
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
    a, b = ([run for run in side if any(run.warm)] for side in (a, b))
    if not a or not b:
        return Speed("not comparable", "no time of a step after the first ones is logged")
    pairs = pairs_of(a, b)
    logs = [math.log(y.tokens_per_s() / x.tokens_per_s()) for x, y in pairs]
    interval, told = _between(
        a, b, lambda run: math.log(run.tokens_per_s()), _unrest_of_times, "in pairs", _ONE_RUN_TIME
    )
    if len(pairs) > 1 and any(_apart_s(x, y) > _FAR_APART_S for x, y in pairs):
        told += "; some did not run side by side: what the machine did meanwhile is in the difference"
    interval = interval.exp()
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
    logged = min(len(run.steps) for run in (*a, *b))
    if not pairs and logged < SMOOTHED_OVER and min(len(a), len(b)) < _FEW:
        return Loss(
            "not comparable",
            f"{ground.why}; they have no seed in common, and {logged} logged losses do not tell batches from recipes: "
            "log more often (metrics.log_freq), or give them one debug.seed",
            at_equal=equal,
        )
    losses = {id(run): loss for run, loss in zip((*a, *b), (*left, *right), strict=True)}
    least = _ONE_RUN_LOSS * abs(fmean(left))

    def unrest(x: Run, y: Run) -> float:
        return max(_unrest_of_losses(x, y, ground.along), least)

    in_pairs = "each of a seed of its own"
    interval, told = _between(a, b, lambda run: losses[id(run)], unrest, in_pairs, _ONE_RUN_LOSS)
    at = {"steps": "at the end", "tokens": "at equal tokens", "flops": "at equal FLOPs"}[ground.along]
    verdict = "different" if interval.excludes(0.0) else "no difference shown"
    why = f"curves may differ: {ground.why}; smoothed, {at}, {told}"
    return Loss(verdict, why, interval.middle, interval.bounds(), None, steps, gaps, equal)


def _between(
    a: Sequence[Run],
    b: Sequence[Run],
    value: Callable[[Run], float],
    unrest: Callable[[Run, Run], float],
    in_pairs: str,
    alike: float,
) -> tuple[Interval, str]:
    """Of b's value over a's, and what it rests on. unrest: by how much it may be off of one run a side. in_pairs: what
    pairs are. alike: by how much two runs of one recipe differ."""
    held, fewest, most = pairs_of(a, b), min(len(a), len(b)), max(len(a), len(b))
    if len(held) > 1 or (held and fewest == 1):
        interval = paired_interval([value(y) - value(x) for x, y in held])
        told = f"{len(held)} repeats, {in_pairs}" if len(held) > 1 else "one run a side with a seed in common"
    else:
        held = list(zip(a, b, strict=False))
        interval = unpaired_interval([value(run) for run in a], [value(run) for run in b])
        told = f"{len(a)} and {len(b)} runs, not in pairs"
    if len(held) == 1:
        what = "one run a side" if most == 1 else told
        told = f"{what}, of which two alike differ by up to {alike:.0%}: repeats say more"
    if len(held) < _FEW:
        interval = interval.within(max(unrest(x, y) for x, y in held))
    return interval, told


def _gaps(x: Run, y: Run) -> tuple[list[int], list[float]]:
    """Steps that both have logged, and y's loss over x's; of losses that are not finite, none where both are alike."""
    left, right = (dict(zip(run.steps, run.curve["loss"], strict=True)) for run in (x, y))
    common = [step for step in left if step in right]
    return common, [0.0 if str(left[step]) == str(right[step]) else right[step] - left[step] for step in common]


def _unrest_of_losses(x: Run, y: Run, along: str) -> float:
    """By how much the gap of two runs may be off. Steps of the same samples go up and down together; else each side
    goes on its own."""
    gaps = _gaps(x, y)[1] if along == "steps" and x.seed == y.seed else []
    series = [gaps] if gaps else [run.curve["loss"] for run in (x, y)]
    own = [block_bootstrap(tail(each)) for each in series]
    return math.hypot(*(each.high - each.low for each in own)) / 2


def _unrest_of_times(x: Run, y: Run) -> float:
    """By how much the logarithm of a ratio of rates may be off, from both runs' own unrest and what another run might
    bring."""
    own = [block_bootstrap([math.log(time) for time in run.steady("step_time_s")], of_medians=True) for run in (x, y)]
    return math.hypot(*((each.high - each.low) / 2 for each in own), math.log1p(_ONE_RUN_TIME))


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
