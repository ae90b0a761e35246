"""Time from launch to the first logged step, against a skeleton with nothing in it.

The skeleton is torchrun, torch, the same model under FSDP2, AdamW and one step: what the machine needs in any
case. Runs interleave; medians are compared. Prints a table and writes JSON.

    python benchmarks/startup.py [--repeats 5] [--json benchmarks/results/startup.json]
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
RECIPE = ROOT / "train_configs" / "llama3_debug.toml"
LIMIT_S = {1: 5.5, 2: 6.5}
OVER_SKELETON_S = 0.6

SKELETON = """
import os, torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan_lite.models.llama3 import SPEC
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = SPEC.build(SPEC.flavors["debugmodel"])
for block in model.layers.values():
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
for module in [model, *model.layers.values()]:
    module.set_force_sum_reduction_for_comms(True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
tokens = torch.randint(2048, (4 // dist.get_world_size(), 257))
loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
loss.backward()
optimizer.step()
if dist.get_rank() == 0:
    print("first step", loss.item(), flush=True)
dist.destroy_process_group()
"""


def seconds_until(command: list[str], marker: str, environment: dict[str, str]) -> float:
    """Wall time from the start of `command` to the first line of its output that holds `marker`."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if marker in line:
                took = time.perf_counter() - started
                process.stdout.read()
                return took
    raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode} before `{marker}`")


def measure(ranks: int, repeats: int, scratch: Path) -> dict[str, list[float]]:
    """Interleaved times of both at 1,024 tokens a step."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {**os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": str(threads)}
    skeleton = scratch / "skeleton.py"
    skeleton.write_text(SKELETON)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(skeleton)]
    times: dict[str, list[float]] = {"torchtitan_lite": [], "skeleton": []}
    for repeat in range(repeats + 1):
        shutil.rmtree(scratch / "run", ignore_errors=True)
        ours = ["./run_train.sh", str(RECIPE), "--training.global_batch_size=4", "--training.steps=2"]
        ours += ["--checkpoint.enable=false", "--validation.enable=false", f"--job.dump_folder={scratch / 'run'}"]
        pair = {
            "torchtitan_lite": seconds_until(ours, "step 1/2  loss", environment),
            "skeleton": seconds_until(launch, "first step", environment),
        }
        if repeat > 0:  # the first pair warms the page cache and the prepared corpus
            for name, took in pair.items():
                times[name].append(took)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in (1, 2):
            times = measure(ranks, options.repeats, Path(scratch))
            ours, skeleton = (statistics.median(times[name]) for name in ("torchtitan_lite", "skeleton"))
            rows.append({"ranks": ranks, "first_step_s": ours, "skeleton_s": skeleton, "times_s": times})
    print(f"{'ranks':>5}  {'first step':>10}  {'limit':>6}  {'skeleton':>8}  {'over it':>8}  {'limit':>6}")
    for row in rows:
        over = row["first_step_s"] - row["skeleton_s"]
        print(
            f"{row['ranks']:>5}  {row['first_step_s']:>8.2f} s  {LIMIT_S[row['ranks']]:>4.1f} s  "
            f"{row['skeleton_s']:>6.2f} s  {over:>+6.2f} s  {OVER_SKELETON_S:>4.1f} s"
        )
    if options.json:
        record = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
