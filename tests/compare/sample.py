"""Comparisons of made-up runs, as documents for the page."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.compare.folders import write_run
from torchtitan_lite.compare.conditions import parse
from torchtitan_lite.compare.document import document
from torchtitan_lite.compare.page import html
from torchtitan_lite.compare.sides import Source, gather
from torchtitan_lite.strict_json import strict_dumps

HOSTILE = '<b onmouseover=alert(1)>"it\'s" & </script><script>alert(2)</script>'

# Label, overrides, step time, loss, memory: what sides are made of, in turns.
_SIDES: tuple[tuple[str, tuple[str, ...], float, float, float], ...] = (
    ("baseline", (), 0.40, 4.00, 0.60),
    ("full-recompute", ("--activation_checkpoint.mode=full",), 0.52, 4.00, 0.38),
    ("double-rate", ("--optimizer.lr=6e-3",), 0.40, 3.91, 0.60),
    ("in-one-piece", ("--training.local_batch_size=4", "--training.loss_chunks=4"), 0.35, 4.0, 0.55),
)


def folders(root: Path, count: int = 3, repeats: int = 3, steps: int = 80) -> list[Path]:
    """Of `count` sides, each with runs of other seeds."""
    found = []
    for index in range(count):
        label, overrides, step_time_s, loss, memory_gib = _SIDES[index % len(_SIDES)]
        side = root / (label if index < len(_SIDES) else f"{label}-{index}")
        for repeat in range(repeats):
            folder = write_run(
                side / f"repeat-{repeat}",
                *overrides,
                seed=42 + repeat,
                steps=steps,
                noise=random.Random(f"{index} {repeat}"),
                step_time_s=step_time_s * (1 + 0.02 * (index // len(_SIDES))),
                loss=loss,
                memory_gib=memory_gib,
            )
            _as_real_runs_are(folder, random.Random(f"norms {index} {repeat}"))
        found.append(side)
    return found


def _as_real_runs_are(folder: Path, draw: random.Random) -> None:
    """A slow first step, spikes of the gradient's norm, memory that grows, and events that few made-up runs have."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["grad_norm"] = draw.lognormvariate(0.5, 0.25) * (1 + 6 / (1 + number)) * (9 if draw.random() < 0.02 else 1)
        line["step_time_s"] *= 15 if number == 0 else 1
        line["memory_peak_gib"] *= 0.9 if number < 3 else 1
    (folder / "metrics.jsonl").write_text("".join(strict_dumps(line) + "\n" for line in lines))
    spent = {"compute_s": 0.3, "communication_s": 0.06, "copies_s": 0.01, "idle_s": draw.uniform(0.01, 0.05)}
    events = [
        {"event": "validation", "step": 80, "loss": draw.gauss(4.2, 0.01)},
        {"event": "traffic", "step": 80, "sent_gib": 0.123},
        {"event": "profile", "step": 20, "step_breakdown": spent},
        {"event": "end", "step": 80, "memory_peak_gib": [0.25, 0.75]},
    ]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 0.0, "attempt": 1, **event}) + "\n" for event in events)


def told(
    found: Sequence[Path],
    conditions: Sequence[str] = ("A.loss ≈ B.loss",),
    target_loss: float | None = 4.5,
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """The document of a comparison of run folders."""
    names = [*labels, *[""] * (len(found) - len(labels))]
    sources = [Source(str(folder), label=label) for folder, label in zip(found, names, strict=True)]
    sides, failed = gather(sources, 2, None)
    asked = {"steps": None, "repeats": None, "target_loss": target_loss}
    return document(sides, failed, [], [parse(each) for each in conditions], asked)


def full(root: Path, count: int = 3, repeats: int = 3, steps: int = 80) -> dict[str, Any]:
    """With everything that a page may show: runs cut short, recipes refused, files that extend others."""
    found = folders(root, count, repeats, steps)
    cut = found[-1] / f"repeat-{repeats - 1}"
    for name, kept in (("metrics.jsonl", steps // 2), ("events.jsonl", 1)):
        lines = (cut / name).read_text().splitlines(keepends=True)
        (cut / name).write_text("".join(lines[:kept]))
    record = told([*found, root / "none"], ["B.loss ≈ A.loss", "B.memory < 0.1"])
    record["refused"].append(
        {"name": "E", "what": "--parallelism.tensor_parallel_degree=3", "told": "3 does not divide 8 heads"}
    )
    record["sides"][0]["chain"] = ["train_configs/baseline.toml", "train_configs/llama3_debug.toml"]
    return record


if __name__ == "__main__":
    # python -m tests.compare.sample FOLDER SIDES REPEATS STEPS: writes FOLDER/report.html, with all that it may show,
    # and FOLDER/usual.html of the same runs where nothing went wrong.
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    sizes = [int(each) for each in sys.argv[2:]]
    (place / "report.html").write_text(html(full(place / "runs", *sizes)))
    (place / "usual.html").write_text(html(told(folders(place / "usual", *sizes), [])))
