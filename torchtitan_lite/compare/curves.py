"""What a comparison's charts draw: curves of each side's runs and of their middle, in few enough points. No torch."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from torchtitan_lite.compare.courses import seconds_up_to
from torchtitan_lite.compare.markup import finite

LOGGED = ("loss", "grad_norm", "step_time_s", "memory_peak_gib")
METRICS = (*LOGGED, "loss_gap")
AXES = ("step", "tokens", "seconds")
POINTS = 2000  # of a curve, at most
_SMOOTH_POINTS = 500
_SMOOTHED_OVER = 25  # the part of a run that a smooth value is the median of
_DIGITS = 7

Curve = dict[str, list[float | None]]


def chart_data(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By side with curves: {name, label, index, middle, smooth, repeats}. index: among all sides. middle: of its runs,
    the run itself where there is one. repeats: the runs where there are more.

    A curve has the names of AXES and of METRICS; None stands for what is not finite. loss_gap: a run's loss above that
    of the first side's run of its seed; None where there is none, for the first side, and where losses are not of the
    same samples at each step.
    """
    alike = {pair["b"] for pair in document["pairs"] if pair["comparable"]["data"] and pair["along"] == "steps"}
    found: list[dict[str, Any]] = []
    first: dict[Any, Curve] = {}
    for index, side in enumerate(document["sides"]):
        told = [run for run in side["runs"] if run["curve"].get("step")]
        runs = [_whole(run["curve"], first.get(run["seed"]) if side["name"] in alike else None) for run in told]
        if not found:
            first = {run["seed"]: curve for run, curve in zip(told, runs, strict=True)}
        if runs:
            middle = middle_of(runs)
            found.append(
                {
                    "name": side["name"],
                    "label": side["label"],
                    "index": index,
                    "middle": thinned(middle),
                    "smooth": smoothed(middle),
                    "repeats": [thinned(run) for run in runs] if len(runs) > 1 else [],
                }
            )
    return found


def middle_of(runs: Sequence[Curve]) -> Curve:
    """The median of runs at each step that at least half of them have logged; of values that are not finite, none."""
    by_step: dict[float, list[tuple[Curve, int]]] = {}
    for run in runs:
        for index, step in enumerate(run["step"]):
            by_step.setdefault(step or 0.0, []).append((run, index))
    kept = sorted(step for step, places in by_step.items() if 2 * len(places) >= len(runs))
    middle: Curve = {"step": list(kept)}
    for name in ("tokens", *METRICS):
        middle[name] = [_median([run[name][index] for run, index in by_step[step]]) for step in kept]
    return {**middle, "seconds": [*seconds_up_to(kept, middle["step_time_s"])]}


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` of them: the first and the last, and of each stretch the lowest and highest of every metric."""
    count = len(curve["step"])
    keep = set(range(count))
    if count > points:
        stretches = (points - 2) // (2 * len(METRICS))
        keep = {0, count - 1}
        for number in range(stretches):
            stretch = range(number * count // stretches, (number + 1) * count // stretches)
            for name in METRICS:
                values = [(value, index) for index in stretch if (value := curve[name][index]) is not None]
                keep |= {min(values)[1], max(values)[1]} if values else {stretch[0]}
    return {name: [_short(values[index]) for index in sorted(keep)] for name, values in curve.items()}


def smoothed(curve: Curve, points: int = _SMOOTH_POINTS) -> Curve:
    """Running medians, at most `points` of them. Near the start they are of fewer values, as many before as after:
    where a curve falls steeply, the median of one side would lie below it. At the end, where it is flat, they
    look back.
    """
    count = len(curve["step"])
    reach = count // _SMOOTHED_OVER // 2
    places = range(count) if count <= points else [at * (count - 1) // (points - 1) for at in range(points)]
    smooth: Curve = {name: [_short(curve[name][at]) for at in places] for name in AXES}
    for at in places:
        near = min(reach, at)
        for name in METRICS:
            smooth.setdefault(name, []).append(_short(_median(curve[name][at - near : at + near + 1])))
    return smooth


def broken(sides: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """A sentence for each run whose values are not all finite."""
    told = []
    for side in sides:
        for run in side["runs"]:
            steps, values = run["curve"].get("step", []), run["curve"].get(metric, [])
            if bad := [step for step, value in zip(steps, values, strict=True) if finite(value) is None]:
                told.append(
                    f"{side['name']}, seed {run['seed']}: not finite at {len(bad)} of {len(steps)} logged steps, "
                    f"first at step {bad[0]}"
                )
    return told


def _whole(curve: Mapping[str, Sequence[Any]], beside: Curve | None) -> Curve:
    """With the seconds that steps took up to each logged one, the loss above that of `beside`, and None for what is not
    finite."""
    found: Curve = {name: [finite(value) for value in curve[name]] for name in ("step", "tokens", *LOGGED)}
    losses = dict(zip(beside["step"], beside["loss"], strict=True)) if beside else {}
    found["loss_gap"] = [
        None if loss is None or (other := losses.get(step)) is None else loss - other
        for step, loss in zip(found["step"], found["loss"], strict=True)
    ]
    return {**found, "seconds": [*seconds_up_to(curve["step"], found["step_time_s"])]}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _short(value: float | None) -> float | None:
    """Fewer digits than a double has: no chart shows them."""
    if value is None or value == int(value):
        return None if value is None else int(value)
    return float(f"{value:.{_DIGITS}g}")
