"""What each parallelism technique costs alone: step time over the plain model, bytes sent over their minimum.

Time: on n ranks a step has n times the plain model's global batch, so that each rank has the FLOPs of the plain model
on its batch. The plain model is a bare loop (forward, backward, clipping, AdamW) with a rank's threads, in n processes
side by side, so that the cores are shared alike; its batch is one micro-batch. Pairs of the two alternate; a step
takes as long as its slowest rank; medians, and the median ratio of the pairs. The optimizer's work is not scaled:
where parameters are split, a rank updates fewer than the plain model does.

Bytes: what one rank sends in one step after the first (see traffic.py), of the rank that is furthest above its
minimum. The formulas stand in parallel_techniques.py. Collectives of one or two numbers (gradient norm, valid tokens
and samples) are counted apart as bookkeeping. A technique that sends more than LIMIT x its minimum ends in exit code 1,
and so does one below it: then the count or the formula is wrong.

    python benchmarks/parallel_overhead.py [--ranks 2] [--only TEXT] [--quick] [--breakdown] [--json PATH]
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from parallel_techniques import ROWS, SEQ_LEN, SHAPE, SPEC, TECHNIQUES, Technique
from traffic import Call, Traffic

from torchtitan_lite.assembly import Recipe, assemble
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.mesh import axis, build_mesh
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.optimizer import build_optimizer
from torchtitan_lite.preflight import JobPlan

CORES = len(os.sched_getaffinity(0))
REPEATS = 5
LIMIT = 1.05
BOOKKEEPING = 2  # numbers
TIMEOUT = timedelta(seconds=180)


class Plain:
    """A bare loop on the whole model; one a process."""

    def __init__(self) -> None:
        self.model = SPEC.build(SHAPE)
        initialize(self.model, 42, lambda name: SPEC.initial(name, SHAPE))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        (self.batch,) = random_batches(1, ROWS, seed=0)

    def step(self) -> None:
        logits = self.model(self.batch.tokens)
        F.cross_entropy(logits.flatten(0, 1), self.batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Parallel:
    """The step of trainer.Trainer on random tokens."""

    def __init__(self, plan: JobPlan, rank: int) -> None:
        recipe = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
        mesh = build_mesh(plan.dims, "cpu")
        self.model = assemble(recipe, mesh, torch.device("cpu"), rank)
        stages = axis(mesh, "pp")
        self.stages = None if stages is None else stages.get_group()
        self.optimizer = build_optimizer(plan.config.optimizer, self.model.named_parameters())
        self.max_norm = plan.config.training.max_norm
        seed = plan.dims.batch_rank(rank)
        self.batches = random_batches(plan.batch.microbatches, plan.batch.microbatch_size, seed)
        # Torch cannot make its causal bias, which is a tensor subclass, within a dispatch mode: a mask takes its place.
        self.masked = [replace(batch, documents=torch.zeros_like(batch.tokens)) for batch in self.batches]

    def calls_of_step(self) -> list[Call]:
        with Traffic() as traffic:
            self.step(self.masked)
        return traffic.calls

    def step(self, batches: Sequence[Batch] | None = None) -> None:
        self.model.forward_backward(batches or self.batches)
        clip_by_global_norm(self.model.parameters(), self.max_norm, self.stages)
        self.optimizer.step()
        self.optimizer.zero_grad()


def random_batches(count: int, rows: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SHAPE.vocab_size, (count, rows, SEQ_LEN + 1), generator=generator)
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


@dataclass
class Measured:
    """Of one technique on one rank. pairs: seconds of a step, (technique, plain), of the slowest rank. calls: of one
    step, parts: (sent, minimum) bytes of each of the technique's parts."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    parts: list[tuple[float, float]] = field(default_factory=list)

    @property
    def bookkeeping(self) -> float:
        return sum(call.sent for call in self.calls if call.numbers <= BOOKKEEPING)


def on_rank(rank: int, ranks: int, chosen: Sequence[int], repeats: int, scratch: str) -> None:
    """Measure the techniques of these indices; each rank writes what it found."""
    torch.set_num_threads(threads_of(ranks))
    dist.init_process_group("gloo", f"file://{scratch}/meet", rank=rank, world_size=ranks, timeout=TIMEOUT)
    plain = Plain()
    plain.step()
    found = []
    for index in chosen:
        gc.collect()
        found.append(measure(TECHNIQUES[index], plain, rank, ranks, repeats))
    torch.save(found, Path(scratch) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(technique: Technique, plain: Plain, rank: int, ranks: int, repeats: int) -> Measured:
    plan = technique.plan(ranks)
    ours, found = Parallel(plan, rank), Measured()
    ours.step()  # buffers, connections and lazy set-up come with the first
    found.calls = ours.calls_of_step()
    for part in technique.parts:
        sent = sum(call.sent for call in found.calls if call.numbers > BOOKKEEPING and part.holds(call))
        found.parts.append((sent, part.minimum(plan, rank)))
    for _ in range(repeats):
        bare = seconds_of(plain.step)
        found.pairs.append((seconds_of(ours.step), bare))
    return found


def seconds_of(step: Callable[[], None]) -> float:
    """Of one step, on the slowest rank; collective."""
    gc.collect()
    gc.disable()
    dist.barrier()
    started = time.perf_counter()
    step()
    took = torch.tensor(time.perf_counter() - started)
    gc.enable()
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def threads_of(ranks: int) -> int:
    return max(1, CORES // ranks)


def run(ranks: int, chosen: Sequence[int], repeats: int) -> list[list[Measured]]:
    """For each chosen technique what each rank found."""
    os.environ["OMP_NUM_THREADS"] = str(threads_of(ranks))  # read when the ranks import torch
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(on_rank, (ranks, chosen, repeats, scratch), nprocs=ranks)
        # Written by the ranks above.
        every = [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [list(of_ranks) for of_ranks in zip(*every, strict=True)]


def rows_of(technique: Technique, ranks: int, found: list[Measured]) -> Iterator[dict[str, Any]]:
    """A row for each part; times and bookkeeping stand in the first."""
    pairs = found[0].pairs
    times = {
        "step_s": statistics.median(ours for ours, _ in pairs),
        "plain_s": statistics.median(plain for _, plain in pairs),
        "time_ratio": statistics.median(ours / plain for ours, plain in pairs),
        "bookkeeping_bytes": max(each.bookkeeping for each in found),
        "pairs_s": pairs,
    }
    for index, part in enumerate(technique.parts):
        ratio, sent, least = max((each.parts[index][0] / each.parts[index][1], *each.parts[index]) for each in found)
        bytes_of = {"sent_bytes": sent, "minimum_bytes": least, "bytes_ratio": ratio, "formula": part.formula}
        name = technique.name if index == 0 else f"  {part.name}"
        yield {"technique": name, "ranks": ranks, **bytes_of, **(times if index == 0 else {})}


# Header and width on the console; the first and the last are text.
COLUMNS = {
    "technique": 27,
    "ranks": 5,
    "step s": 7,
    "plain s": 7,
    "x plain": 7,
    "MiB sent": 8,
    "minimum": 7,
    "x min": 5,
    "bookkeeping KiB": 15,
    "minimum is": 0,
}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = ("", "", "")
    if "step_s" in row:
        times = (f"{row['step_s']:.3f}", f"{row['plain_s']:.3f}", f"{row['time_ratio']:.2f}")
    sent, least = (f"{row[key] / 2**20:.2f}" for key in ("sent_bytes", "minimum_bytes"))
    small = f"{row['bookkeeping_bytes'] / 1024:.2f}" if "bookkeeping_bytes" in row else ""
    ratio = f"{row['bytes_ratio']:.3f}"
    return (row["technique"], str(row["ranks"]), *times, sent, least, ratio, small, row["formula"])


def line(texts: Iterable[str]) -> str:
    first, *numbers, last = zip(texts, COLUMNS.values(), strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in numbers), last[0]])


def markdown(record: dict[str, Any]) -> str:
    lines = [tuple(COLUMNS), ("---",) * len(COLUMNS), *map(cells, record["rows"])]
    return "\n".join(f"| {' | '.join(text.strip() for text in each)} |" for each in lines)


def breakdown(found: list[Measured]) -> None:
    """The collectives of the rank that sends most, by kind, shape and call site."""
    most = max(found, key=lambda each: sum(call.sent for call in each.calls))
    calls = Counter(most.calls)
    for call, count in sorted(calls.items(), key=lambda item: -item[0].sent * item[1]):
        what = f"{count:>4} x {call.kind:<14} {list(call.shape)!s:<20} over {call.ranks}"
        print(f"    {what}  {count * call.sent / 2**20:>8.3f} MiB  {call.site}")


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        where = f"{row['technique'].strip()} on {row['ranks']} ranks: sends {row['bytes_ratio']:.3f} x its minimum"
        if row["bytes_ratio"] > LIMIT:
            found.append(f"{where}, more than {LIMIT}")
        elif row["bytes_ratio"] < 0.999:
            found.append(f"{where}: the count or the formula is wrong")
    return found


def matmul_flop_s() -> float:
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(2, 4), help="of one world size only")
    parser.add_argument("--only", default="", help="techniques whose name holds this")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="pairs of steps")
    parser.add_argument("--quick", action="store_true", help="one pair")
    parser.add_argument("--breakdown", action="store_true", help="list the collectives of each technique")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the table of an earlier run")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return 0
    rows = []
    print(f"{SHAPE.parameter_count():,} parameters, {ROWS} x {SEQ_LEN} tokens a rank, {CORES} cores")
    for ranks in (options.ranks,) if options.ranks else (2, 4):
        shared = f": {ranks} processes share {CORES} cores, plain ones too" if ranks > CORES else ""
        print(f"\n{ranks} ranks of {threads_of(ranks)} threads{shared}\n{line(COLUMNS)}", flush=True)
        chosen = [i for i, each in enumerate(TECHNIQUES) if ranks in each.ranks and options.only in each.name]
        for index, found in zip(chosen, run(ranks, chosen, 1 if options.quick else options.repeats), strict=True):
            for row in rows_of(TECHNIQUES[index], ranks, found):
                rows.append(row)
                print(line(cells(row)))
            if options.breakdown:
                breakdown(found)
    if options.json:
        write(options.json, rows)
    for failure in failures(rows):
        print(failure)
    return 1 if failures(rows) else 0


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    record = {
        "date": date.today().isoformat(),
        "cores": CORES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_flop_s": matmul_flop_s(),
        "tokens_per_rank": ROWS * SEQ_LEN,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
