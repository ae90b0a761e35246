"""Run folders with made-up numbers: what a run would have written."""

import json
import math
import random
from pathlib import Path
from typing import Any

from torchtitan_lite.compare.document import document
from torchtitan_lite.compare.sides import Source, gather
from torchtitan_lite.preflight import plan_job
from torchtitan_lite.recipe_diff import of_plan
from torchtitan_lite.strict_json import strict_dumps

FULL = "--activation_checkpoint.mode=full"
RECIPE = "train_configs/llama3_debug.toml"
_FLOPS_PER_TOKEN = 3e7


def write_run(
    folder: Path,
    *overrides: str,
    seed: int = 42,
    steps: int = 80,
    ranks: int = 2,
    noise: random.Random | None = None,
    step_time_s: float = 0.4,
    loss: float = 4.0,
    wiggle: float = 0.0,
    memory_gib: float = 0.6,
    data: str = "corpus",
    end: bool = True,
    started: float | None = 1e9,
) -> Path:
    """A run of the debug recipe with `overrides`.

    noise: unrest of a machine, in times: 1% from run to run and 5% from step to step; none where that is None. loss:
    at the end, falling from 9. wiggle: what is added to each loss, relatively. data: stands for the corpus. started:
    when the comparison that ran it started it, seconds since 1970; None: it ran on its own.
    """
    plan = plan_job(RECIPE, [f"--debug.seed={seed}", f"--training.steps={steps}", *overrides], ranks)
    side = of_plan(plan, "")
    folder.mkdir(parents=True)
    identity = {"model": "llama3", "tokenizer": "spm", "data": data, "data.mixture_weights": None}
    identity["training.seq_len"] = str(plan.config.training.seq_len)
    record = {"config": side.config, "derived": side.derived, "filled": list(side.filled), "world_size": ranks}
    record |= {"device": "CPU", "versions": {"torch": "2.13.0"}, "identity": identity}
    (folder / "config.json").write_text(json.dumps(record))
    if started is not None:
        (folder / "compare.json").write_text(json.dumps({"state": "finished", "started": started, "first_step_s": 5.0}))
    of_run = noise.gauss(1.0, 0.01) if noise else 1.0
    samples = random.Random(seed)  # what each batch brings is the same for all recipes
    lines = []
    for step in range(1, steps + 1):
        falling = loss + (9 - loss) * math.exp(-5 * step / steps) + samples.gauss(0.0, 0.03)
        time = step_time_s * of_run * (noise.gauss(1.0, 0.05) if noise else 1.0)
        lines.append(_line(step, falling * (1 + wiggle), time, plan.tokens_per_step, ranks, memory_gib))
    (folder / "metrics.jsonl").write_text("".join(strict_dumps(line) + "\n" for line in lines))
    events = [{"event": "start", "step": 0}, *([{"event": "end", "step": steps}] if end else [])]
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 0.0, "attempt": 1, **e}) + "\n" for e in events))
    return folder


def _line(step: int, loss: float, time: float, tokens: int, ranks: int, memory_gib: float) -> dict[str, Any]:
    tps = tokens / time / ranks
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_seen": step * tokens,
        "step_time_s": time,
        "data_time_s": 1e-3,
        "tps": tps,
        "tflops": tps * _FLOPS_PER_TOKEN / 1e12,
        "mfu": None,
        "memory_peak_gib": memory_gib,
        "attempt": 1,
    }


def write_side(folder: Path, *overrides: str, repeats: int = 5, **made: Any) -> str:
    for repeat in range(repeats):
        write_run(folder / f"repeat-{repeat}", *overrides, seed=42 + repeat, **made)
    return str(folder)


def compared(*sources: str, **asked: Any) -> dict[str, Any]:
    sides, failed = gather([Source(source) for source in sources], 2, None)
    return document(sides, failed, [], [], {"steps": None, "repeats": None, "target_loss": None, **asked})


def pair_of(*sources: str) -> dict[str, Any]:
    return dict(compared(*sources)["pairs"][0])
