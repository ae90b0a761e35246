"""What each technique costs and gives on one rank: seconds a step, peak memory, time to the first step.

The default recipe, a technique at a time, all its tokens in one micro-batch. Runs interleave; ratios are medians of
pairs with the plain run of the same turn. Prints a table and writes JSON.

    python benchmarks/techniques.py [--repeats 5] [--only compile] [--json benchmarks/results/techniques.json]
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = "train_configs/llama3_debug.toml"
CORES = len(os.sched_getaffinity(0))
STEPS, SKIPPED = 12, 3  # the first ones warm up
PLAIN = "plain"
_AC, _OPTION = "--activation_checkpoint.mode=", "--activation_checkpoint.selective_ac_option="
TECHNIQUES: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "checkpointing, every second block": (f"{_AC}selective", f"{_OPTION}2"),
    "checkpointing, by operation": (f"{_AC}selective", f"{_OPTION}op"),
    "checkpointing, full": (f"{_AC}full",),
    "loss in 8 parts": ("--training.loss_chunks=8",),
    "compile": ("--compile.enable=true",),
    "compile, checkpointing by operation": ("--compile.enable=true", f"{_AC}selective", f"{_OPTION}op"),
    "compile, memory budget 0.5": ("--compile.enable=true", f"{_AC}memory_budget"),
}


def run(overrides: tuple[str, ...], scratch: Path) -> dict[str, float]:
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["./run_train.sh", RECIPE, f"--training.steps={STEPS}", f"--job.dump_folder={folder}"]
    command += ["--checkpoint.enable=false", "--validation.enable=false", *overrides]
    environment = {**os.environ, "NPROC": "1", "OMP_NUM_THREADS": str(CORES)}
    started, first_step_s = time.perf_counter(), 0.0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"step +1/", line) and not first_step_s:
                first_step_s = time.perf_counter() - started
    if process.returncode or not first_step_s:
        raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode}, or told of no first step")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_s": statistics.median(line["step_time_s"] for line in lines[SKIPPED:]),
        "peak_gib": lines[-1]["memory_peak_gib"],
        "first_step_s": first_step_s,
        "loss": lines[-1]["loss"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="techniques whose name has this text in it, beside the plain run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = {name: given for name, given in TECHNIQUES.items() if name == PLAIN or options.only in name}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name, overrides in chosen.items():
                print(f"\r{repeat + 1} of {options.repeats}: {name:<40}", end="", file=sys.stderr, flush=True)
                found[name].append(run(overrides, Path(scratch)))
    print(file=sys.stderr)
    print("| technique | s a step | x plain | peak GiB | first step s | last loss differs |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, runs in found.items():
        pairs = list(zip(runs, found[PLAIN], strict=True))
        row = {key: statistics.median(each[key] for each in runs) for key in ("step_s", "peak_gib", "first_step_s")}
        row["ratio"] = statistics.median(each["step_s"] / plain["step_s"] for each, plain in pairs)
        row["loss_differs"] = max(abs(each["loss"] / plain["loss"] - 1) for each, plain in pairs)
        rows.append({"technique": name, **row, "runs": runs})
        print(
            f"| {name} | {row['step_s']:.3f} | {row['ratio']:.2f} | {row['peak_gib']:.2f} | "
            f"{row['first_step_s']:.1f} | {row['loss_differs']:.1e} |"
        )
    if options.json:
        record = {"cores": CORES, "python": platform.python_version(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
