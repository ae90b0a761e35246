"""Time of a step and memory of a rank as model, sequence, ranks and accumulation grow, beside what theory says.

A point is a run of its own; runs interleave, medians are compared. Time by theory is the FLOPs of a rank's share of a
step over the cores it has, through the series' first point: growth is compared, not level (benchmarks/step.py has
that). Memory by theory are the bytes that a rank cannot do without: parameters, gradients and AdamW's two states over
the shards, what blocks keep of a micro-batch, and its logits twice, as log-probabilities and as gradient. Measured
memory is the peak above that of a model of next to nothing on as many ranks. Growth is the exponent of a power law,
fitted by least squares of logarithms, of measurement and theory alike. Points with more ranks than cores are marked,
and in no fit. Prints a table, writes JSON and a plot.

    python benchmarks/scaling.py [--repeats 3] [--quick] [--json FILE] [--svg docs/images/scaling.svg]
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.preflight import JobPlan, plan_job

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "train_configs" / "llama3_debug.toml"
CORES = len(os.sched_getaffinity(0))
STEPS, SKIPPED = 7, 2  # the first ones warm up
MIB = 1 << 20
WIDTHS = (32, 128, 192, 256, 384, 512)  # the first is the model of next to nothing
_DEBUG = LLAMA3.flavors["debugmodel"]
SPEC = replace(
    LLAMA3,
    flavors={
        str(dim): replace(_DEBUG, dim=dim, ffn_dim=3 * dim, n_heads=dim // 32, n_kv_heads=dim // 32) for dim in WIDTHS
    },
)


@dataclass(frozen=True)
class Point:
    """x: what grows in its series. rows: sequences a step, micro: of a rank's micro-batch."""

    series: str
    x: int
    width: int = 256
    seq_len: int = 256
    rows: int = 4
    micro: int = 4
    ranks: int = 1
    threads: int = CORES

    @property
    def oversubscribed(self) -> bool:
        return self.ranks * self.threads > CORES

    def overrides(self) -> list[str]:
        settings = {
            "model.spec": "scaling:SPEC",
            "model.flavor": self.width,
            "training.seq_len": self.seq_len,
            "training.global_batch_size": self.rows,
            "training.local_batch_size": self.micro,
            "training.steps": STEPS,
            "activation_checkpoint.mode": "none",
            "data.document_mask": "false",
            "checkpoint.enable": "false",
            "validation.enable": "false",
            "metrics.enable_tensorboard": "false",
        }
        return [f"--{key}={value}" for key, value in settings.items()]


MODEL, SEQUENCE, RANKS, ACCUMULATION = "width of the model", "sequence length", "ranks, FSDP", "micro-batches"
POINTS = (
    *(Point(MODEL, width, width=width) for width in WIDTHS[1:]),
    *(Point(SEQUENCE, length, seq_len=length, rows=1, micro=1) for length in (256, 512, 1024, 2048)),
    *(Point(RANKS, ranks, width=384, micro=4 // ranks, ranks=ranks, threads=1) for ranks in (1, 2, 4)),
    *(Point(ACCUMULATION, count, rows=8, micro=8 // count) for count in (1, 2, 4, 8)),
)


def nothing(ranks: int) -> Point:
    return Point("", 0, width=WIDTHS[0], seq_len=16, rows=ranks, micro=1, ranks=ranks, threads=1)


def plan_of(point: Point) -> JobPlan:
    return plan_job(RECIPE, point.overrides(), point.ranks)


def flops(point: Point) -> float:
    """Of a rank in a step."""
    tokens = point.rows * point.seq_len / point.ranks
    return tokens * sum(SPEC.flavors[str(point.width)].flops_by_module(point.seq_len).values())


def least_bytes(point: Point) -> dict[str, float]:
    plan, shape = plan_of(point), SPEC.flavors[str(point.width)]
    weights = 4.0 * shape.parameter_count() / plan.dims.dp_shard
    tokens = plan.batch.microbatch_size * point.seq_len
    kept = shape.n_layers * shape.saved_by_block(plan.saving())
    return {
        "parameters": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "kept": tokens * kept,
        "logits": tokens * 2 * 4.0 * shape.vocab_size,
    }


def run(point: Point, scratch: Path) -> tuple[float, float]:
    """Median seconds of a step, and the peak MiB of a rank."""
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    paths = [str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "NPROC": str(point.ranks), "OMP_NUM_THREADS": str(point.threads)}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = ["./run_train.sh", str(RECIPE), f"--job.dump_folder={folder}", *point.overrides()]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_time_s"] for line in lines[SKIPPED:]), lines[-1]["memory_peak_gib"] * 1024


def growth(xs: list[float], ys: list[float]) -> float:
    """Exponent of the power law through the points, by least squares of logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def measured(points: list[Point], repeats: int) -> list[dict]:
    """A row for each point."""
    bases = [nothing(ranks) for ranks in sorted({point.ranks for point in points})]
    found: dict[Point, list[tuple[float, float]]] = {point: [] for point in [*bases, *points]}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for point, runs in found.items():
                print(f"\r{repeat + 1} of {repeats}: {point.series} {point.x:<30}", end="", file=sys.stderr, flush=True)
                runs.append(run(point, Path(scratch)))
    print(file=sys.stderr)
    rows: list[dict] = []
    for point in points:
        seconds, peak = (statistics.median(column) for column in zip(*found[point], strict=True))
        base = statistics.median(memory for _, memory in found[nothing(point.ranks)])
        row = {"series": point.series, "x": point.x, "oversubscribed": point.oversubscribed, "step_s": seconds}
        row |= {"peak_mib": peak, "above_mib": peak - base, "gflop": flops(point) / 1e9, "runs": found[point]}
        row["least_mib"] = {name: size / MIB for name, size in least_bytes(point).items()}
        first: dict = next((each for each in rows if each["series"] == point.series), row)
        # Ranks beyond the cores take turns on them.
        turns = max(1.0, point.ranks * point.threads / CORES)
        row["theory_s"] = first["step_s"] * row["gflop"] / first["gflop"] * turns
        row["theory_mib"] = sum(row["least_mib"].values())
        rows.append(row)
    return rows


def exponents(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of each series, by column."""
    found = {}
    for series in dict.fromkeys(row["series"] for row in rows):
        fitted = [row for row in rows if row["series"] == series and not row["oversubscribed"]]
        xs = [row["x"] for row in fitted]
        columns = ("step_s", "theory_s", "above_mib", "theory_mib")
        found[series] = {column: growth(xs, [row[column] for row in fitted]) for column in columns}
    return found


def table(rows: list[dict]) -> None:
    print("| | | s a step | by theory | MiB a rank | by theory | of it states | kept | logits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        least = row["least_mib"]
        states = least["parameters"] + least["gradients"] + least["optimizer"]
        print(
            f"| {row['series']} | {row['x']}{' *' if row['oversubscribed'] else ''} | {row['step_s']:.3f} | "
            f"{row['theory_s']:.3f} | {row['above_mib']:.0f} | {row['theory_mib']:.0f} | {states:.0f} | "
            f"{least['kept']:.0f} | {least['logits']:.0f} |"
        )
    print("\n| growth with | exponent of time | by theory | exponent of memory | by theory |")
    print("|---|---|---|---|---|")
    for series, fits in exponents(rows).items():
        print(f"| {series} | {' | '.join(f'{value:+.2f}' for value in fits.values())} |")
    if any(row["oversubscribed"] for row in rows):
        print(f"\n\\* more ranks than the {CORES} cores, which they share: in no fit.")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    # As in plot_loss.py: the same rows draw the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "torchtitan_lite", "font.size": 9})
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    series = list(dict.fromkeys(row["series"] for row in rows))
    figure, panels = plt.subplots(2, len(series), figsize=(10, 4.8), layout="constrained", squeeze=False)
    quantities = (("step_s", "theory_s", "s a step", "#1f5fa8"), ("above_mib", "theory_mib", "MiB a rank", "#c4501b"))
    for column, name in enumerate(series):
        shown = [row for row in rows if row["series"] == name]
        xs = [row["x"] for row in shown]
        for axes, (value, theory, label, color) in zip(panels[:, column], quantities, strict=True):
            axes.loglog(xs, [row[value] for row in shown], "o-", color=color, label="measured")
            axes.loglog(xs, [row[theory] for row in shown], "--", color="#555555", label="theory")
            axes.set_xticks(xs, [f"{row['x']}{'*' if row['oversubscribed'] else ''}" for row in shown])
            axes.xaxis.set_minor_locator(NullLocator())
            low = min(row[key] for row in shown for key in (value, theory))
            high = max(row[key] for row in shown for key in (value, theory))
            axes.set_ylim(low / 1.5, high * 1.5)
            axes.grid(alpha=0.3, which="both")
            if column == 0:
                axes.set_ylabel(label)
        panels[1, column].set_xlabel(name)
    panels[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two small points of each series, once: does it run?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    points, repeats = list(POINTS), options.repeats
    if options.quick:
        by_series = {point.series: [each for each in POINTS if each.series == point.series] for point in POINTS}
        points, repeats = [point for series in by_series.values() for point in series[:2]], 1
    rows = measured(points, repeats)
    table(rows)
    if options.json:
        record = {"cores": CORES, "python": platform.python_version(), "exponents": exponents(rows), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.svg:
        plot(rows, options.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
