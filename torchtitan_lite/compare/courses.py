"""Runs along what they spend: which belong together, and what their losses are where they have spent as much."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torchtitan_lite.compare.runs import Run, tail

_SLACK = 1 + 1e-9  # of sums that should be the same
_SMOOTHED_OVER = 5  # logged values, to say where a loss is reached


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
    total, before, sums = 0.0, 0, []
    for step, seconds in zip(run.steps, run.curve["step_time_s"], strict=True):
        total, before = total + (step - before) * seconds, step
        sums.append(total)
    return sums


def ends(a: Sequence[Run], b: Sequence[Run], along: str) -> tuple[float, list[float], list[float]]:
    """What all runs have spent at least, and the loss of each run of a and of b there: the mean over one stretch before
    it, the longest of the runs' own (tail): of a loss that falls, the mean of a longer one is higher."""
    courses = [[spent(run, along) for run in side] for side in (a, b)]
    every = [course for side in courses for course in side]
    most = min(course[-1] for course in every)
    since = min(tail(_until(course, most))[0] for course in every)
    losses = [
        [_within(run, course, since, most) for run, course in zip(side, each, strict=True)]
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
        if fmean(losses[max(0, index + 1 - _SMOOTHED_OVER) : index + 1]) <= target:
            return {
                along[:-1] if along == "steps" else along: spent(run, along)[index]
                for along in ("steps", "tokens", "seconds")
            }
    return None


def _until(course: Sequence[float], most: float) -> Sequence[float]:
    """At least the first."""
    return [at for at in course if at <= most * _SLACK] or course[:1]


def _within(run: Run, course: Sequence[float], since: float, most: float) -> float:
    found = [loss for loss, at in zip(run.curve["loss"], course, strict=True) if since <= at <= most * _SLACK]
    return fmean(found or run.curve["loss"][:1])
