"""TorchTitan and this, the same model on the same machine in one run: tokens/s, time to the first step, peak memory.

Llama 3's debug model in float32, 1,024 tokens a step, plain causal attention, plain loss, fused AdamW, a log line a
step on all sides; TorchTitan 0.3.0 and 0.2.2 by their own trainers (see peer_launcher.py), and a bare torch loop, the
floor that a framework adds its overhead to. Runs interleave; a ratio is the median over rounds of one round's pair.
What it takes to run TorchTitan is installed into --peers, once. Prints tables and the bars, writes JSON; exit code 1
where a bar is missed.

    python benchmarks/peer.py [--rounds 5] [--peers DIR] [--only "1 rank"] [--json benchmarks/results/peer.json]
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
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

from step import BATCH, CORES, RECIPE, ROOT, SEQ_LEN, SKIPPED, STEPS

TOKENS = BATCH * SEQ_LEN
BARE, OURS, NEWER, OLDER = "bare loop", "torchtitan_lite", "TorchTitan 0.3.0", "TorchTitan 0.2.2"
DDP = "--parallelism.data_parallel_replicate_degree=2"
SELECTIVE = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")


@dataclass(frozen=True)
class Setting:
    """A line of runs to compare. ours: overrides of the recipe."""

    name: str
    sides: tuple[str, ...]
    ranks: int = 1
    mesh: str = "fsdp"
    checkpointing: str = "none"
    compile: bool = False
    ours: tuple[str, ...] = ()


ONE, FSDP = "1 rank", "2 ranks, FSDP"
COMPILED = "1 rank, compile"
SETTINGS = (
    Setting(ONE, (BARE, OURS, NEWER, OLDER)),
    Setting("1 rank, checkpointing by operation", (OURS, NEWER, OLDER), checkpointing="op", ours=SELECTIVE),
    Setting(COMPILED, (OURS, NEWER), compile=True, ours=("--compile.enable=true",)),
    Setting(FSDP, (OURS, NEWER, OLDER), ranks=2),
    Setting("2 ranks, DDP", (OURS, NEWER, OLDER), ranks=2, mesh="ddp", ours=(DDP,)),
)


@dataclass(frozen=True)
class Peer:
    """How a TorchTitan is started: interpreter, and folders for its path."""

    python: Path
    path: tuple[Path, ...]


def installed(folder: Path) -> dict[str, Peer | str]:
    """Each TorchTitan, or the reason why it is not at hand."""
    python, triton, older = folder / "venv" / "bin" / "python", folder / "triton", folder / "0.2.2"
    peers: dict[str, Peer | str] = {NEWER: Peer(python, (triton,)), OLDER: Peer(python, (older, triton))}
    stamp = folder / "complete"
    if stamp.exists():
        return peers
    folder.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(python.parents[1])],
        [*pip, "torch==2.13.0"],
        [*pip, "torchtitan==0.3.0"],
        # Imported at start by both, and used by neither on a CPU.
        [*pip, "--no-deps", f"--target={triton}", "triton"],
        [*pip, "--no-deps", f"--target={older}", "torchtitan==0.2.2"],
    ]
    for number, command in enumerate(steps, start=1):
        print(f"\rinstalling TorchTitan, {number} of {len(steps)}", end="", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
            reason = (errors or done.stdout.splitlines() or ["no word of why"])[-1]
            return dict.fromkeys(peers, f"{' '.join(command[-2:])}: {reason}")
    print(file=sys.stderr)
    stamp.touch()
    return peers


def measured(command: list[str], marker: str, environment: dict[str, str]) -> float:
    """Run to the end; seconds from the start to the first line that matches `marker`."""
    started, took, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if took is None and re.search(marker, line):
                took = time.perf_counter() - started
    if process.returncode or took is None:
        raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode}\n{''.join(lines[-30:])}")
    return took


def ours(setting: Setting, scratch: Path, environment: dict[str, str]) -> dict[str, float]:
    command = ["./run_train.sh", RECIPE, f"--training.global_batch_size={BATCH}", f"--training.steps={STEPS}"]
    command += ["--checkpoint.enable=false", "--validation.enable=false", "--metrics.enable_tensorboard=false"]
    command += ["--data.document_mask=false", "--optimizer.lr=8e-4", f"--job.dump_folder={scratch}", *setting.ours]
    first = measured(command, r"step +1/", environment)
    lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(line["step_time_s"] for line in lines[SKIPPED:])
    return {"step_s": step, "first_step_s": first, "peak_mib": lines[-1]["memory_peak_gib"] * 1024}


def theirs(
    peer: Peer, setting: Setting, shared: Path, scratch: Path, environment: dict[str, str], parameters: int
) -> dict[str, float]:
    run = {
        "mesh": setting.mesh,
        "ranks": setting.ranks,
        "checkpointing": setting.checkpointing,
        "compile": setting.compile,
        "seq_len": SEQ_LEN,
        "batch": BATCH,
        "local_batch": BATCH // setting.ranks,
        "steps": STEPS,
        "assets": str(shared),
    }
    launch = [str(peer.python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.ranks}"]
    command = [*launch, str(ROOT / "benchmarks" / "peer_launcher.py"), str(scratch), json.dumps(run)]
    path = os.pathsep.join(map(str, peer.path))
    own = {**environment, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(shared / "cache")}
    first = measured(command, "first step done", own)
    ranks = [json.loads((scratch / f"rank-{rank}.json").read_text()) for rank in range(setting.ranks)]
    if any(rank["parameters"] != parameters for rank in ranks):
        raise RuntimeError(f"not the same model: {ranks[0]['parameters']:,} parameters, not {parameters:,}")
    ends = ranks[0]["ends"]
    times = [end - before for before, end in pairwise(ends)][SKIPPED - 1 :]
    peak = max(rank["peak_kib"] for rank in ranks) / 1024
    return {"step_s": statistics.median(times), "first_step_s": first, "peak_mib": peak}


def bare(environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--bare"]
    step, peak, rate = json.loads(subprocess.check_output(command, env=environment, cwd=ROOT))
    return {"step_s": step, "peak_mib": peak * 1024, "matmul_flop_s": rate}


Runs = dict[str, dict[str, list[dict[str, float]]]]


def compared(settings: list[Setting], rounds: int, peers: dict[str, Peer | str], parameters: int) -> Runs:
    """Of each setting and side its runs, one a round."""
    found: Runs = {setting.name: {} for setting in settings}
    total = rounds * sum(len(setting.sides) for setting in settings)
    with tempfile.TemporaryDirectory() as name:
        shared, done = Path(name), 0
        (shared / "corpus").mkdir()
        for number, path in enumerate(sorted((ROOT / "torchtitan_lite").rglob("*.py"))):
            shutil.copy(path, shared / "corpus" / f"{number:03d}.txt")
        if isinstance(peer := peers[NEWER], Peer):
            launcher = str(ROOT / "benchmarks" / "peer_launcher.py")
            subprocess.run([str(peer.python), launcher, "--prepare", str(shared)], check=True)
        for _ in range(rounds):
            for setting in settings:
                environment = {**os.environ, "NPROC": str(setting.ranks)}
                environment["OMP_NUM_THREADS"] = str(max(1, CORES // setting.ranks))
                environment["PYTHONPATH"] = str(ROOT)
                for side in setting.sides:
                    done += 1
                    print(f"\r{done} of {total}: {setting.name}, {side:<30}", end="", file=sys.stderr, flush=True)
                    scratch = shared / "run"
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir()
                    if side == BARE:
                        run = bare(environment)
                    elif side == OURS:
                        run = ours(setting, scratch, environment)
                    elif isinstance(peer := peers[side], Peer):
                        run = theirs(peer, setting, shared, scratch, environment, parameters)
                    else:
                        continue
                    found[setting.name].setdefault(side, []).append(run)
    print(file=sys.stderr)
    return found


def ratio(found: Runs, key: str, over: tuple[str, str], under: tuple[str, str]) -> float | None:
    """Median over rounds of one run's figure over another's; None where one of them did not run."""
    ups, downs = (found.get(setting, {}).get(side) for setting, side in (over, under))
    return (
        statistics.median(up[key] / down[key] for up, down in zip(ups, downs, strict=True)) if ups and downs else None
    )


def bars(found: Runs) -> list[dict[str, object]]:
    """What is wanted of each ratio, at least or at most, and what was found."""

    def of(key: str, setting: str) -> float | None:
        return ratio(found, key, (setting, OURS), (setting, NEWER))

    def speed(setting: str) -> float | None:
        return ratio(found, "step_s", (setting, NEWER), (setting, OURS))

    wanted = (
        ("tokens/s over TorchTitan 0.3.0, 1 rank", "at least", 1.10, speed(ONE)),
        ("tokens/s over TorchTitan 0.3.0, 2 ranks, FSDP", "at least", 1.20, speed(FSDP)),
        ("time to first step over TorchTitan 0.3.0, 1 rank", "at most", 0.85, of("first_step_s", ONE)),
        ("time to first step over TorchTitan 0.3.0, 2 ranks, FSDP", "at most", 0.85, of("first_step_s", FSDP)),
        ("peak memory over TorchTitan 0.3.0, 1 rank", "at most", 0.85, of("peak_mib", ONE)),
        ("peak memory over TorchTitan 0.3.0, 2 ranks, FSDP", "at most", 0.85, of("peak_mib", FSDP)),
        ("a step over the bare loop, 1 rank", "at most", 1.02, ratio(found, "step_s", (ONE, OURS), (ONE, BARE))),
        (
            "a step with compile over the bare loop",
            "at most",
            1.00,
            ratio(found, "step_s", (COMPILED, OURS), (ONE, BARE)),
        ),
    )
    lines = []
    for what, way, bar, value in wanted:
        met = None if value is None else value >= bar if way == "at least" else value <= bar
        lines.append({"bar": what, "way": way, "wanted": bar, "measured": value, "met": met})
    return lines


def report(found: Runs, peers: dict[str, Peer | str], flops: float) -> list[dict[str, object]]:
    runs = [run for sides in found.values() for side in sides.values() for run in side if "matmul_flop_s" in run]
    rate = statistics.median(run["matmul_flop_s"] for run in runs) if runs else None
    of_rate = f" (of {rate / 1e9:.0f} GFLOP/s)" if rate else ""
    print(f"| | | tokens/s | s a step | spread | matmul rate{of_rate} | first step s | peak MiB a rank |")
    print("|---|---|---|---|---|---|---|---|")
    for setting, sides in found.items():
        for side, each in sides.items():
            steps = [run["step_s"] for run in each]
            step = statistics.median(steps)
            first = f"{statistics.median(run['first_step_s'] for run in each):.2f}" if side != BARE else ""
            share = f"{flops / step / rate:.0%}" if rate else ""
            print(
                f"| {setting} | {side} | {TOKENS / step:,.0f} | {step:.3f} | {min(steps):.3f} to {max(steps):.3f} | "
                f"{share} | {first} | {statistics.median(run['peak_mib'] for run in each):.0f} |"
            )
    for side, peer in peers.items():
        if isinstance(peer, str):
            print(f"\n{side} is not at hand: {peer}")
    lines = bars(found)
    print("\n| bar | wanted | measured | |\n|---|---|---|---|")
    for line in lines:
        value = "" if line["measured"] is None else f"{line['measured']:.2f}"
        verdict = {None: "not measured", True: "met", False: "missed"}[line["met"]]  # type: ignore[index]
        print(f"| {line['bar']} | {line['way']} {line['wanted']:.2f} | {value} | {verdict} |")
    return lines


def main() -> int:
    from torchtitan_lite.models.llama3 import SPEC

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=cache / "torchtitan_lite" / "peers")
    parser.add_argument("--only", default="", help="settings whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = [setting for setting in SETTINGS if setting.name.startswith(options.only)]
    if not settings:
        parser.error(f'--only "{options.only}" begins no setting; they are {", ".join(each.name for each in SETTINGS)}')
    args = SPEC.flavors["debugmodel"]
    parameters, flops = args.parameter_count(), sum(args.flops_by_module(SEQ_LEN).values()) * TOKENS
    peers = installed(options.peers.absolute())
    found = compared(settings, options.rounds, peers, parameters)
    print(f"{parameters:,} parameters on all sides, {flops / 1e9:.1f} GFLOP a step, {date.today().isoformat()}\n")
    lines = report(found, peers, flops)
    if options.json:
        machine = {
            "cores": CORES,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": "2.13.0",
        }
        missing = {side: peer for side, peer in peers.items() if isinstance(peer, str)}
        record = {"date": date.today().isoformat(), **machine, "not_at_hand": missing, "bars": lines, "runs": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(line["met"] is False for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
