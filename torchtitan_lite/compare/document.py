"""report.json: everything that a comparison found, for its page, its table, and other programs. No torch."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torchtitan_lite.compare.comparable import ground
from torchtitan_lite.compare.conditions import Condition, judge
from torchtitan_lite.compare.courses import pairs_of, reached, whole_of
from torchtitan_lite.compare.runs import Run
from torchtitan_lite.compare.sides import OWN, Side, Source
from torchtitan_lite.compare.statistics import block_bootstrap
from torchtitan_lite.compare.verdicts import loss_verdict, memory_of, speed_verdict
from torchtitan_lite.compare.words import of_all, of_pair
from torchtitan_lite.files import replace
from torchtitan_lite.recipe_diff import parted
from torchtitan_lite.strict_json import strict_dumps

VERSION = 1
_CURVES = ("loss", "grad_norm", "step_time_s", "memory_peak_gib")


def document(
    sides: Sequence[Side],
    failed: Sequence[tuple[Source, str]],
    refused: Sequence[tuple[Source, str]],
    conditions: Sequence[Condition],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """failed: what the user named and cannot be compared. refused: combinations of a sweep that rules forbid. asked:
    steps, repeats and target_loss of the command."""
    able = [side for side in sides if side.runs]
    target = asked.get("target_loss")
    pairs = [_pair(able[0], other, target) for other in able[1:]]
    told = [_side(side, target) for side in sides]
    summaries = {side["name"]: side["summary"] for side in told}
    by_name = {side.name: side for side in able}
    absent = {source.name: why for source, why in (*failed, *refused)}
    absent |= {side.name: side.lost[0][1] for side in sides if side.lost and not side.runs}
    judged = []
    for condition in conditions:
        named = dict.fromkeys((condition.left[0], *([condition.right[0]] if condition.right else [])))
        if gone := [f"{name} is not there to be judged: {absent[name]}" for name in named if name in absent]:
            judged.append({"condition": condition.text, "holds": False, "told": "; ".join(gone)})
            continue
        of = [by_name.get(name) for name in condition.sides or ()]
        pair = _pair(of[0], of[1], None) if len(of) == 2 and of[0] and of[1] else None
        judged.append(judge(condition, summaries, pair))
    record = {
        "version": VERSION,
        "created": time.time(),
        **asked,
        "machine": _machine(able),
        "sides": told,
        "pairs": pairs,
        "refused": [{"name": source.name, "what": " ".join(source.overrides), "told": why} for source, why in refused],
        "failed": [{"name": source.name, "source": str(source), "told": why} for source, why in failed],
        "assertions": judged,
    }
    return {**record, "words": of_all(record)}


def _pair(a: Side, b: Side, target: float | None) -> dict[str, Any]:
    config, derived = parted(a.described, b.described)
    config = {
        section: kept
        for section, keys in config.items()
        if (kept := {key: pair for key, pair in keys.items() if f"{section}.{key}" not in OWN})
    }
    if not pairs_of(a.runs, b.runs):  # else each pair has a seed of its own
        config["debug"] = {**config.get("debug", {}), "seed": (a.runs[0].seed, b.runs[0].seed)}
    shared = ground(a.runs[0], b.runs[0], config, derived)
    pair = {
        "a": a.name,
        "b": b.name,
        "along": shared.along,
        "comparable": shared.record(),
        "loss": asdict(loss_verdict(a.runs, b.runs, shared)),
        "speed": asdict(speed_verdict(a.runs, b.runs, shared)),
        "memory": memory_of(a.runs, b.runs),
        "communication": _communication(a.runs, b.runs),
        "config_diff": config,
        "derived_diff": {key: values for key, values in derived.items() if key not in OWN},
    }
    if target is not None:
        pair["target"] = _target_ratio(a, b, target)
    return {**pair, "words": of_pair(pair, a.label, b.label)}


def _communication(a: Sequence[Run], b: Sequence[Run]) -> dict[str, float | None]:
    """GiB that the first rank sends in a step, the middle of each side's runs; None where it is not recorded."""
    x, y = (_middle([run.sent_gib for run in side]) for side in (a, b))
    return {"a_gib": x, "b_gib": y, "ratio": y / x if x and y is not None else None}


def _target_ratio(a: Side, b: Side, target: float) -> dict[str, float | None]:
    """B's over A's, of what it takes to reach the target; None where not all runs of both reach it."""
    found = [_target(side.runs, target) for side in (a, b)]
    alike = all(each["reached"] == len(side.runs) for each, side in zip(found, (a, b), strict=True))
    return {what: found[1][what] / found[0][what] if alike else None for what in ("step", "tokens", "seconds")}


def _target(runs: Sequence[Run], target: float) -> dict[str, Any]:
    found = [each for run in runs if (each := reached(run, target)) is not None]
    return {
        "loss": target,
        "reached": len(found),
        **{what: median(each[what] for each in found) if found else None for what in ("step", "tokens", "seconds")},
    }


def _side(side: Side, target: float | None) -> dict[str, Any]:
    described = side.described
    chain = list(side.plan.origin.chain) if side.plan else list(side.runs[0].chain)
    runs = [_run(run) for run in side.runs]
    runs += [
        {"folder": str(folder), "seed": None, "state": "failed", "told": told, "curve": {}}
        for folder, told in side.lost
    ]
    return {
        "name": side.name,
        "label": side.label,
        "source": str(side.source),
        "kind": "recipe" if side.plan else "runs",
        "chain": chain,
        "given": list(side.given),
        "ranks": described.world_size,
        "model": " ".join(str(described.config["model"][key]) for key in ("name", "flavor")),
        "device": side.runs[0].device if side.runs else None,
        "tokens_per_step": side.runs[0].tokens_per_step if side.runs else None,
        "derived": described.derived,
        "runs": runs,
        "summary": _summary(side.runs, target) if side.runs else {},
    }


def _run(run: Run) -> dict[str, Any]:
    curve = {name: run.curve[name] for name in _CURVES}
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "state": "finished" if run.finished else "cut short",
        "told": run.told,
        "curve": {"step": run.steps, "tokens": run.curve["tokens_seen"], **curve},
    }


def _summary(runs: Sequence[Run], target: float | None) -> dict[str, Any]:
    """The middle of a side's runs; None for what none of them knows."""
    times = [run.step_time_s() for run in runs]
    spread = [time for run in runs for time in run.steady("step_time_s")]
    breakdowns = [run.breakdown for run in runs if run.breakdown]
    parts = [key for key in breakdowns[0] if all(key in each for each in breakdowns)] if breakdowns else []
    by_rank = [run.memory_by_rank for run in runs if run.memory_by_rank]
    summary = {
        "loss": fmean(run.final_loss() for run in whole_of(runs)),
        "validation_loss": _middle([run.validation_loss for run in runs]),
        "step_time_s": median(times),
        "step_time_interval": block_bootstrap(times if len(times) > 1 else spread, of_medians=True).bounds(),
        "tps": median(run.tokens_per_s() / run.ranks for run in runs),
        "tokens_per_s": median(run.tokens_per_s() for run in runs),
        "tflops": median(median(run.steady("tflops")) for run in runs),
        "mfu": _middle([run.mfu() for run in runs]),
        "first_step_s": _middle([run.mark.get("first_step_s") for run in runs]),
        "compile_s": _middle([run.compile_s for run in runs]),
        "data_time_s": median(median(run.steady("data_time_s")) for run in runs),
        "memory_peak_gib": median(max(run.curve["memory_peak_gib"]) for run in runs),
        "memory_by_rank": [median(ranks) for ranks in zip(*by_rank, strict=False)] or None,
        "communication_gib": _middle([run.sent_gib for run in runs]),
        "breakdown": {key: fmean(each[key] for each in breakdowns) for key in parts} or None,
    }
    return summary if target is None else {**summary, "target": _target(runs, target)}


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _machine(sides: Sequence[Side]) -> dict[str, Any]:
    run = sides[0].runs[0] if sides else None
    return {
        "host": os.uname().nodename,
        "device": run.device if run else None,
        "cores": len(os.sched_getaffinity(0)),
        "torch": run.versions.get("torch") if run else None,
    }


def write(folder: Path, record: Mapping[str, Any], page: Callable[[Mapping[str, Any]], str]) -> None:
    """report.json, then report.html as `page` makes it: what it stumbles over loses no finding."""
    replace(folder / "report.json", strict_dumps(record, indent=1))
    replace(folder / "report.html", page(record))
