"""One GPU, one command, ten minutes at most: tokens/s, MFU and peak memory of the trainer on models of published width.

Llama 3 8B's width and Qwen3 30B-A3B's, cut to the layers that fit, at sequences of 8,192: eager and compiled, Float8,
checkpointing, loss in parts; and TorchTitan on the same card with the same shape, where --torchtitan names an
interpreter that has it. Each case is the launcher's own run in a process of its own, read from its metrics.jsonl; one
that runs out of memory or time is reported so, and those for which no time is left are skipped. Prints a table and
the targets, writes JSON; exit code 1 where a target is missed or a case failed.

    python benchmarks/gpu.py [--minutes 10] [--only compile] [--torchtitan PYTHON] [--json benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu --tiny        # end to end without a GPU, on models of no width
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import CASES, Case, layers_that_fit

from torchtitan_lite.observability.hardware import peak_tflops

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "train_configs" / "llama3_debug.toml"
SEQ_LEN, STEPS, LOG_FREQ, SKIPPED = 8192, 20, 5, 2  # logged steps, of which the first ones warm up
LEAST_S, MOST_S = 45.0, 150.0  # of a case: not begun with less time left, ended after more
TARGET_MFU, TARGET_FLOAT8 = 0.50, 1.25
MACHINE = """
import json, platform, torch
from importlib.metadata import PackageNotFoundError, version
def known(name):
    try: return version(name)
    except PackageNotFoundError: return None
cuda = torch.cuda.is_available()
about = {"device": torch.cuda.get_device_name() if cuda else "CPU", "python": platform.python_version()}
about["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory if cuda else None
about |= {"torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps(about | {name: known(name) for name in ("torchao", "triton", "torchtitan")}))
"""


@dataclass(frozen=True)
class Bench:
    """What all cases share. tokenizer, corpus, scratch: prepared once. seq_len: of the one sample a step."""

    device: str
    tiny: bool
    seq_len: int
    scratch: Path
    corpus: Path
    tokenizer: Path
    environment: dict[str, str]
    memory: float

    def layers(self, model: str) -> int:
        args = list(getattr(gpu_cases, model).flavors.values())[-1]
        return args.n_layers if self.tiny else layers_that_fit(args, self.seq_len, self.memory)

    def overrides(self, case: Case, folder: Path) -> list[str]:
        settings = {
            "model.spec": f"gpu_cases:{case.model}",
            "model.flavor": self.layers(case.model),
            "model.tokenizer_path": self.tokenizer,
            "training.dataset": "text",
            "training.dataset_path": self.corpus,
            "training.seq_len": self.seq_len,
            "training.global_batch_size": 1,
            "training.steps": STEPS,
            "training.mixed_precision_param": "float32" if self.tiny else "bfloat16",
            "optimizer.lr": 1e-4,
            "checkpoint.enable": "false",
            "validation.enable": "false",
            "metrics.log_freq": LOG_FREQ,
            "metrics.enable_tensorboard": "false",
            "data.cache_folder": self.scratch / "cache",
            "job.dump_folder": folder,
        }
        return [*(f"--{key}={value}" for key, value in settings.items()), *case.overrides]


def ours(bench: Bench, case: Case, limit_s: float) -> dict[str, Any]:
    """A row of the table: state "ok" with figures, or what happened instead."""
    if not bench.layers(case.model):
        return {"state": "skipped", "why": "not one layer fits into the memory of this card"}
    folder = bench.scratch / re.sub(r"\W+", "-", case.name)
    command = [sys.executable, "-m", "torchtitan_lite.launch", str(RECIPE), *bench.overrides(case, folder)]
    state, text = ended(command, bench.environment, limit_s)
    metrics = read_lines(folder / "metrics.jsonl")
    if state != "ok":
        return {"state": state, "why": last_words(text)}
    found = metrics[SKIPPED:]
    told = {line["event"]: line for line in read_lines(folder / "events.jsonl")}
    keys = ("tps", "tflops", "mfu", "mfu_float8")
    return {
        "state": "ok",
        **{key: middle([line.get(key) for line in found]) for key in keys},
        "peak_gib": found[-1]["memory_peak_gib"],
        "compile_s": told["compiled"]["seconds"] if "compiled" in told else None,
        "loss": found[-1]["loss"],
    }


def torchtitan(bench: Bench, python: str, config: str, limit_s: float) -> dict[str, Any]:
    """The same shape by TorchTitan's own trainer (see titan_gpu.py), read from what it prints; FLOPs as ours."""
    layers = bench.layers("LLAMA")
    named = {"LAYERS": layers, "SEQ_LEN": bench.seq_len, "STEPS": STEPS, "LOG_FREQ": LOG_FREQ, "CORPUS": bench.corpus}
    folder = bench.scratch / f"titan-{config}"
    folder.mkdir()
    environment = {**bench.environment, **{f"TITAN_{key}": str(value) for key, value in named.items()}}
    environment |= {"TITAN_FOLDER": str(folder), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)  # nothing of ours but the shape
    # Without torchrun, whose ranks would outlive it: the card is the next case's.
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {**rendezvous, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    command = [python, "-m", "torchtitan.train", "--module=titan_gpu", f"--config={config}"]
    state, text = ended(command, environment, limit_s)
    steps = re.findall(r"step: +(\d+) .*?memory: +([\d.]+)GiB.*?tps: ([\d,]+)", text)
    if state != "ok" or len(steps) <= SKIPPED:
        return {"state": state if state != "ok" else "failed", "why": last_words(text)}
    flops = sum(gpu_cases.LLAMA.flavors[str(layers)].flops_by_module(bench.seq_len).values())
    tps = statistics.median(float(tps.replace(",", "")) for _, _, tps in steps[SKIPPED:])
    tflops, memory = tps * flops / 1e12, max(float(gib) for _, gib, _ in steps)
    return {"state": "ok", "tps": tps, "tflops": tflops, "mfu": None, "peak_gib": memory}


def ended(command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[str, str]:
    """Run to the end or for `limit_s`: ("ok", "out of memory", "out of time" or "failed", what it printed)."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks die with the launcher
        text, _ = process.communicate()
        return "out of time", text
    if process.returncode == 0:
        return "ok", text
    return "out of memory" if "out of memory" in text.lower() else "failed", text


def last_words(text: str) -> str:
    """The line that says most of what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error: |^error: (?!rank \d+ failed)", line)]
    return (errors or lines or ["it printed nothing"])[-1][:200]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def prepared(options: argparse.Namespace, scratch: Path, machine: dict[str, Any]) -> Bench:
    """A text and a tokenizer that all cases share: this package's sources, in 512 pieces."""
    corpus, cache = scratch / "corpus", scratch / "cache"
    corpus.mkdir()
    for number, path in enumerate(sorted((ROOT / "torchtitan_lite").rglob("*.py"))):
        (corpus / f"{number:03d}.txt").write_text(path.read_text())
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "NPROC": "1"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    data = [f"--training.dataset_path={corpus}", "--training.dataset=text", f"--data.cache_folder={cache}"]
    spec = ["--model.spec=gpu_cases:TINY_LLAMA", "--model.flavor=1"]
    command = [sys.executable, "-m", "torchtitan_lite", "prepare", str(RECIPE), *data, *spec]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (tokenizer,) = cache.glob("tokenizer-*/tokenizer.model")
    seq_len = 64 if options.tiny else SEQ_LEN
    memory = machine["memory_bytes"] or 0
    return Bench(options.device, options.tiny, seq_len, scratch, corpus, tokenizer, environment, memory)


def targets(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each with what was measured, None where it could not be."""
    done = {row["case"]: row for row in rows if row["state"] == "ok" and peak_tflops(device) is not None}

    def best(key: str, *names: str) -> float | None:
        return max((done[name][key] for name in names if name in done), default=None)

    def either(name: str) -> tuple[str, str]:
        """All logits at once, and in parts: which is quicker depends on the card."""
        return name, f"{name}, chunked loss"

    plain = either("compile")
    bfloat16, quick = best("tps", *plain), best("tps", *either("float8 tensorwise"), *either("float8 rowwise"))
    theirs, theirs_float8 = best("tps", "TorchTitan, compile"), best("tps", "TorchTitan, float8 rowwise")
    wanted = (
        ("MFU in bfloat16 with compile, on an H100", TARGET_MFU, best("mfu", *plain) if "H100" in device else None),
        ("Float8 over bfloat16, both compiled", TARGET_FLOAT8, quick and bfloat16 and quick / bfloat16),
        ("TorchTitan in bfloat16 on this card", 1.0, bfloat16 and theirs and bfloat16 / theirs),
        ("TorchTitan in float8 on this card", 1.0, quick and theirs_float8 and quick / theirs_float8),
    )
    return [{"target": what, "at_least": least, "measured": found} for what, least, found in wanted]


def report(rows: list[dict[str, Any]], aims: list[dict[str, Any]]) -> None:
    print("| case | layers | tokens/s | TFLOP/s | MFU | MFU float8 | peak GiB | compile s | |")
    print("|---|---|---|---|---|---|---|---|---|")
    formats = {"tps": ",.0f", "tflops": ".1f", "mfu": ".1%", "mfu_float8": ".1%", "peak_gib": ".2f", "compile_s": ".1f"}
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in formats.items()]
        told = "" if row["state"] == "ok" else f"{row['state']}: {row['why']}"
        print(f"| {row['case']} | {row['layers'] or ''} | {' | '.join(cells)} | {told} |")
    print("\n| target | at least | measured | |\n|---|---|---|---|")
    for aim in aims:
        found, least = aim["measured"], aim["at_least"]
        verdict = "not measured" if found is None else "met" if found >= least else "missed"
        print(f"| {aim['target']} | {least:.2f} | {'' if found is None else f'{found:.2f}'} | {verdict} |")


def measured(options: argparse.Namespace, bench: Bench, deadline: float) -> list[dict[str, Any]]:
    cases: list[tuple[str, str, Any]] = []
    for case in CASES:
        own = case.of_tiny() if options.tiny else case
        cases.append((case.name, own.model, lambda limit_s, own=own: ours(bench, own, limit_s)))
        # Right behind what they are compared with.
        config = {"compile, chunked loss": "bfloat16", "float8 rowwise, chunked loss": "float8"}.get(case.name)
        if config is not None:
            name = "TorchTitan, compile" if config == "bfloat16" else "TorchTitan, float8 rowwise"
            cases.append((name, own.model, lambda limit_s, config=config: _theirs(options, bench, config, limit_s)))
    rows = []
    for name, model, run in (each for each in cases if options.only in each[0]):
        left, started = deadline - time.monotonic(), time.monotonic()
        if left < (LEAST_S if bench.device == "cuda" else 0):
            row = {"state": "skipped", "why": f"{max(left, 0):.0f} s of --minutes are left"}
        else:
            print(f"{name}: ", end="", file=sys.stderr, flush=True)
            row = run(min(left, MOST_S))
            print(f"{row['state']} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        row |= {"case": name, "layers": bench.layers(model), "seconds": time.monotonic() - started}
        rows.append(row)
    return rows


def _theirs(options: argparse.Namespace, bench: Bench, config: str, limit_s: float) -> dict[str, Any]:
    if options.torchtitan is None or bench.device == "cpu":
        why = "it trains on GPUs only" if options.torchtitan else "name an interpreter that has it: --torchtitan PYTHON"
        return {"state": "not at hand", "why": why}
    return torchtitan(bench, options.torchtitan, config, limit_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of no width in float32, to see that all runs")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all cases together")
    parser.add_argument("--only", default="", help="cases whose name has this text in it")
    parser.add_argument("--torchtitan", metavar="PYTHON", help="an interpreter that has TorchTitan 0.3.0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})}
    machine, theirs = (
        json.loads(subprocess.check_output([python, "-c", MACHINE], env=environment))
        for python in (sys.executable, options.torchtitan or sys.executable)
    )
    if options.device == "cuda" and machine["memory_bytes"] is None:
        parser.error("there is no GPU here: --device cpu --tiny runs all cases on models of no width")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: 8B's width would take hours")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measured(options, prepared(options, Path(scratch), machine), deadline)
    aims = targets(rows, machine["device"])
    print(f"{machine['device']}, torch {machine['torch']}, {date.today().isoformat()}\n")
    report(rows, aims)
    if options.json:
        about = {"date": date.today().isoformat(), "tiny": options.tiny, **machine}
        about |= {"torchtitans": theirs if options.torchtitan else None}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "targets": aims, "rows": rows}, indent=1) + "\n")
    missed = [aim for aim in aims if aim["measured"] is not None and aim["measured"] < aim["at_least"]]
    return 1 if missed or any(row["state"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
