"""Runs along what they spend: which belong together, and what their losses are where they have spent as much."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torchtitan_lite.compare.runs import SMOOTHED_OVER, Run, tail

_SLACK = 1 + 1e-9  # of sums that should be the same


def pairs_of(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same seed, each in one pair: a run that stood against several would count as often."""
    others: dict[int, list[Run]] = {}
    for run in b:
        others.setdefault(run.seed, []).append(run)
    return [(run, others[run.seed].pop(0)) for run in a if others.get(run.seed)]


def whole_of(runs: Sequence[Run]) -> Sequence[Run]:
    """Those that came to their end, for what is said of the end: one that was cut short would stand for it at a step
    where nobody asked, and where losses are higher. All where none did."""
    return [run for run in runs if run.finished] or runs


def spent(run: Run, along: str) -> list[float]:
    """Up to each logged step: steps, tokens, flops (of the model), or seconds (in steps)."""
    if along == "steps":
        return run.curve["step"]
    if along == "tokens":
        return run.curve["tokens_seen"]
    if along == "flops":
        return [tokens * run.flops_per_token for tokens in run.curve["tokens_seen"]]
    return seconds_up_to(run.curve["step"], run.curve["step_time_s"])


def seconds_up_to(steps: Sequence[float], times: Sequence[float | None]) -> list[float]:
    """Spent in steps up to each logged one; those between took what it tells, and nothing where it tells none."""
    total, before, sums = 0.0, 0.0, []
    for step, time in zip(steps, times, strict=True):
        total, before = total + (step - before) * (time or 0.0), step
        sums.append(total)
    return sums


def ends(a: Sequence[Run], b: Sequence[Run], along: str) -> tuple[float, list[float], list[float]]:
    """What all runs have spent at least, and the loss of each run of a and of b there: the mean at the last values of
    the run whose last ones (tail) begin first, as far as all have logged by then. Of a loss that falls, the mean of a
    longer stretch, or of another mix of points of it, is another."""
    courses = [[spent(run, along) for run in side] for side in (a, b)]
    every = [course for side in courses for course in side]
    most = min(course[-1] for course in every)
    least = max(course[0] for course in every)  # before it, a run has no loss
    seldom = min((tail(_until(course, most)) for course in every), key=lambda course: course[0])
    places = [place for place in seldom if place >= least] or [most]
    losses = [
        [fmean(_loss_at(run, course, place) for place in places) for run, course in zip(side, each, strict=True)]
        for side, each in zip((a, b), courses, strict=True)
    ]
    return most, losses[0], losses[1]


def at_equal(a: Sequence[Run], b: Sequence[Run]) -> dict[str, Any]:
    """Losses where both sides have spent as much: {"tokens" | "flops" | "seconds": {"spent", "a", "b"}}."""
    found = {}
    for along in ("tokens", "flops", "seconds"):
        most, left, right = ends(a, b, along)
        if all(map(math.isfinite, (most, *left, *right))):
            found[along] = {"spent": most, "a": fmean(left), "b": fmean(right)}
    return found


def reached(run: Run, target: float) -> dict[str, float] | None:
    """Step, tokens and seconds at which the loss, smoothed, first is at `target` or below; None where it never is."""
    losses = run.curve["loss"]
    for index in range(len(losses)):
        if fmean(losses[max(0, index + 1 - SMOOTHED_OVER) : index + 1]) <= target:
            return {
                along[:-1] if along == "steps" else along: spent(run, along)[index]
                for along in ("steps", "tokens", "seconds")
            }
    return None


def _until(course: Sequence[float], most: float) -> Sequence[float]:
    """At least the first."""
    return [at for at in course if at <= most * _SLACK] or course[:1]


def _loss_at(run: Run, course: Sequence[float], place: float) -> float:
    """Between two logged values, on the line from one to the other."""
    losses, after = run.curve["loss"], min(bisect_left(course, place), len(course) - 1)
    if after == 0 or course[after] <= place:
        return losses[after]
    weight = (course[after] - place) / (course[after] - course[after - 1])
    return weight * losses[after - 1] + (1 - weight) * losses[after]
