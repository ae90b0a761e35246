"""Output matrix and cross-entropy, forward and backward: with all logits at once, and with those of a part of the
tokens at a time (training.loss_chunks).

Each run is a process of its own, which says its time and the most memory it had beyond its inputs. Runs interleave;
medians are compared. The floor is the three matrix products at this machine's measured rate. Prints a table and
writes JSON.

    python benchmarks/loss.py [--tokens 8192] [--vocabulary 128256] [--dim 256] [--repeats 5] [--json FILE]
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHUNKS = (1, 4, 16, 64)


def child(chunks: int, tokens: int, vocabulary: int, dim: int) -> dict[str, float]:
    """chunks: 0 measures the rate of a product of the same shape instead."""
    import torch
    import torch.nn.functional as F

    from torchtitan_lite.optim.chunked_loss import chunked_loss_sum, loss_and_gradient
    from torchtitan_lite.optim.loss import token_loss_sum

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, dim), torch.randn(vocabulary, dim) / dim**0.5
    labels = torch.randint(vocabulary, (tokens,))
    if chunks == 0:
        part = hidden[: tokens // 8]
        part @ weight.T
        started = time.perf_counter()
        part @ weight.T
        return {"gflops": 2 * part.numel() * vocabulary / (time.perf_counter() - started) / 1e9}
    hidden.requires_grad_()
    weight.requires_grad_()
    before, started = _peak_gib(), time.perf_counter()
    if chunks == 1:
        loss = token_loss_sum(F.linear(hidden, weight)[None], labels[None])
    else:
        loss = chunked_loss_sum(hidden, weight, labels, chunks, loss_and_gradient, None)
    loss.backward()
    took = time.perf_counter() - started
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "seconds": took,
        "peak_gib": _peak_gib() - before,
        "loss": float(loss.detach()),
        "grad_norm": float((hidden.grad.double().square().sum() + weight.grad.double().square().sum()).sqrt()),
    }


def _peak_gib() -> float:
    # Not getrusage: its peak is inherited from the process that started this one.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 2**20


def run(chunks: int, options: argparse.Namespace) -> dict[str, float]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "vocabulary", "dim")]
    done = subprocess.run(
        [sys.executable, __file__, f"--child={chunks}", *sizes],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[int, list[dict[str, float]]] = {chunks: [] for chunks in CHUNKS}
    for repeat in range(options.repeats):
        for chunks in CHUNKS:
            print(f"\rrun {repeat + 1} of {options.repeats}, {chunks} chunks ", end="", file=sys.stderr, flush=True)
            runs[chunks].append(run(chunks, options))
    print(file=sys.stderr)
    rate = statistics.median(run(0, options)["gflops"] for _ in range(3))
    floor = 3 * 2 * options.tokens * options.vocabulary * options.dim / rate / 1e9
    whole = runs[1][0]
    return [
        {
            "chunks": chunks,
            "seconds": statistics.median(each["seconds"] for each in found),
            "ratio": statistics.median(
                each["seconds"] / plain["seconds"] for each, plain in zip(found, runs[1], strict=True)
            ),
            "floor_s": floor,
            "peak_gib": max(each["peak_gib"] for each in found),
            "loss_differs": abs(found[0]["loss"] / whole["loss"] - 1),
            "grad_norm_differs": abs(found[0]["grad_norm"] / whole["grad_norm"] - 1),
            "all_seconds": [each["seconds"] for each in found],
        }
        for chunks, found in runs.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(options.child, options.tokens, options.vocabulary, options.dim)))
        return 0
    rows = measure(options)
    print(
        f"{'loss_chunks':>11}  {'seconds':>8}  {'ratio':>6}  {'of floor':>8}  {'peak':>9}  {'loss':>8}  {'gradient':>8}"
    )
    for row in rows:
        print(
            f"{row['chunks']:>11}  {row['seconds']:>8.2f}  {row['ratio']:>6.3f}  "
            f"{row['floor_s'] / row['seconds']:>8.0%}  {row['peak_gib']:>5.2f} GiB  {row['loss_differs']:>8.1e}  "
            f"{row['grad_norm_differs']:>8.1e}"
        )
    if options.json:
        sizes = {name: getattr(options, name) for name in ("tokens", "vocabulary", "dim")}
        record = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **sizes, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
