"""Time of a step against a bare torch loop on the same model, and against the machine's matmul rate.

The bare loop has the model, AdamW, clipping and random tokens, nothing else. The floor is the step's FLOPs at the
rate of a large float32 matrix product on all threads. Runs interleave; medians are compared. Prints a table and
writes JSON.

    python benchmarks/step.py [--repeats 5] [--json benchmarks/results/step.json]
"""

import argparse
import json
import os
import platform
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
STEPS, SKIPPED = 25, 5  # the first ones warm up
SEQ_LEN, BATCH = 256, 4
MESHES = {
    "1 rank": (1, ()),
    "2 ranks, FSDP": (2, ()),
    "2 ranks, DDP": (2, ("--parallelism.data_parallel_replicate_degree=2",)),
}


def ours(ranks: int, overrides: tuple[str, ...], scratch: Path) -> tuple[float, float]:
    """Median seconds of a step, and peak GiB of a rank, from the run's own metrics."""
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = ["./run_train.sh", RECIPE, f"--training.global_batch_size={BATCH}", f"--training.steps={STEPS}"]
    command += ["--checkpoint.enable=false", "--validation.enable=false", f"--job.dump_folder={run}", *overrides]
    environment = {**os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": str(max(1, CORES // ranks))}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_time_s"] for line in lines[SKIPPED:]), lines[-1]["memory_peak_gib"]


def bare() -> tuple[float, float, float]:
    """Median seconds of a step of a plain loop, peak GiB, and FLOP/s of a matrix product. Runs in its own process."""
    import resource

    import torch
    import torch.nn.functional as F

    from torchtitan_lite.models.common.initialize import initialize
    from torchtitan_lite.models.llama3 import SPEC

    torch.set_num_threads(CORES)
    args = SPEC.flavors["debugmodel"]
    model = SPEC.build(args)
    initialize(model, 42, lambda name: SPEC.initial(name, args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    times = []
    for _ in range(STEPS):
        rows = torch.randint(args.vocab_size, (BATCH, SEQ_LEN + 1))
        started = time.perf_counter()
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    a, b = torch.randn(2, 2048, 2048)
    products = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        products.append(time.perf_counter() - started)
    return statistics.median(times[SKIPPED:]), peak, 2 * 2048**3 / min(products)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare()))
        return 0
    found: dict[str, list[list[float]]] = {"bare loop": [], **{name: [] for name in MESHES}}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.repeats):
            for name, (ranks, overrides) in MESHES.items():
                found[name].append(list(ours(ranks, overrides, Path(scratch))))
            command = [sys.executable, __file__, "--bare"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(CORES)}
            found["bare loop"].append(json.loads(subprocess.check_output(command, env=environment, cwd=ROOT)))
    report(found, options.json)
    return 0


def report(found: dict[str, list[list[float]]], path: Path | None) -> None:
    from torchtitan_lite.models.llama3 import SPEC

    flops = sum(SPEC.flavors["debugmodel"].flops_by_module(SEQ_LEN).values()) * BATCH * SEQ_LEN
    rate = statistics.median(run[2] for run in found["bare loop"])
    floor = flops / rate
    reference = statistics.median(run[0] for run in found["bare loop"])
    print(
        f"{BATCH * SEQ_LEN} tokens, {flops / 1e9:.1f} GFLOP a step; matmul at {rate / 1e9:.0f} GFLOP/s: {floor:.3f} s"
    )
    print(f"{'':<14}  {'s a step':>8}  {'x bare':>6}  {'x floor':>7}  {'GiB a rank':>10}")
    rows = []
    for name, runs in found.items():
        seconds, memory = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        rows.append({"what": name, "step_s": seconds, "memory_gib": memory, "runs": runs})
        print(f"{name:<14}  {seconds:>8.3f}  {seconds / reference:>6.2f}  {seconds / floor:>7.2f}  {memory:>10.2f}")
    if path:
        record = {"cores": CORES, "python": platform.python_version(), "matmul_flop_s": rate, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
