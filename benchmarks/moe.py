"""A mixture of experts against a dense model of the same active FLOPs: time of a step, and bytes that tokens travel.

Steps of all rows alternate within one set of ranks; a step takes as long as its slowest rank; medians, and the median
ratio to the dense step beside it. The models are qwen3's debugmodel and debugmodel_moe; "in turn" is
debug.moe_force_load_balance. Floor: the step's FLOPs at the rate of a large float32 product on the same threads.

Bytes: what the ranks send together in dispatch and combine of one step, forward and backward, over two minima:
a row for each choice of an expert elsewhere (nothing is sent but what is chosen), and a row for each token and rank
(what kernels could reach that send a token once to a rank where two of its experts are, and add up there).

    python benchmarks/moe.py [--repeats 7] [--json benchmarks/results/moe.json]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from parallel_overhead import CORES, TIMEOUT, Parallel, matmul_flop_s, seconds_of, threads_of
from parallel_techniques import SEQ_LEN
from torch import Tensor

from torchtitan_lite.models.common.routing import Routing
from torchtitan_lite.preflight import plan_job

RECIPES = Path(__file__).parent.parent / "train_configs"
ROWS = 8  # samples of a rank
EP2, IN_TURN = "--parallelism.expert_parallel_degree=2", "--debug.moe_force_load_balance=true"
LIMIT = 1.001  # of the bytes over a row for each choice


@dataclass(frozen=True)
class Row:
    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


DENSE = Row("dense", "qwen3_debug.toml")
MIXTURES = (Row("ep 1", "qwen3_moe_debug.toml"), Row("ep 1, in turn", "qwen3_moe_debug.toml", (IN_TURN,)))
SHARED = (
    Row("ep 2", "qwen3_moe_debug.toml", (EP2,)),
    Row("ep 2, in turn", "qwen3_moe_debug.toml", (EP2, IN_TURN)),
    Row("ep 2, in halves", "qwen3_moe_debug.toml", (EP2, "--moe.overlap_halves=true")),
)


class Step(Parallel):
    """The trainer's step of a row, and what its choices would have to send."""

    def __init__(self, row: Row, rank: int, ranks: int) -> None:
        sizes = [f"--training.seq_len={SEQ_LEN}", f"--training.global_batch_size={ROWS * ranks}"]
        self.plan = plan_job(RECIPES / row.recipe, [*sizes, *row.overrides], ranks)
        super().__init__(self.plan, rank)
        self.flops = sum(self.plan.model_args.flops_by_module(SEQ_LEN).values()) * SEQ_LEN * ROWS
        self.rank = rank

    def step(self, batches: Any = None) -> None:
        super().step(batches)
        if self.model.balance is not None:
            self.model.balance.step()

    def travelled(self) -> tuple[float, float, float]:
        """Bytes this rank sends in a step's dispatch and combine; both minima."""
        ep, experts, dim = self.plan.dims.ep, self.plan.parallel.experts, self.plan.model_args.dim
        choices, pairs, hooks = 0, 0, []

        def count(module: Any, args: Any, out: Any) -> None:
            nonlocal choices, pairs
            ranks: Tensor = out[0] * ep // experts.num_experts  # type: ignore[union-attr]
            away = ranks != self.rank % ep
            choices += int(away.sum())
            pairs += int(sum((ranks == other).any(-1).sum() for other in range(ep) if other != self.rank % ep))

        for part in self.model.parts:
            hooks += [m.register_forward_hook(count) for m in part.modules() if isinstance(m, Routing)]
        calls = self.calls_of_step()
        for hook in hooks:
            hook.remove()
        rows = sum(call.sent for call in calls if call.kind == "all-to-all" and call.shape[-1] == dim)
        # There and back, forward and backward, float32.
        return rows, choices * dim * 4 * 4, pairs * dim * 4 * 4


def on_rank(rank: int, ranks: int, rows: Sequence[Row], repeats: int, scratch: str) -> None:
    torch.set_num_threads(threads_of(ranks))
    dist.init_process_group("gloo", f"file://{scratch}/meet", rank=rank, world_size=ranks, timeout=TIMEOUT)
    steps = [Step(row, rank, ranks) for row in rows]
    bytes_of = []
    for step in steps:
        step.step()  # buffers, connections and lazy set-up come with the first
        travelled = torch.tensor(step.travelled(), dtype=torch.float64)
        dist.all_reduce(travelled)
        bytes_of.append(travelled.tolist())
    times = [[seconds_of(step.step) for step in steps] for _ in range(repeats)]
    if rank == 0:
        record = {"times": times, "bytes": bytes_of, "flops": [step.flops for step in steps], "rate": matmul_flop_s()}
        (Path(scratch) / "found.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, rows: Sequence[Row], repeats: int) -> list[dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = str(threads_of(ranks))  # read when the ranks import torch
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(on_rank, (ranks, rows, repeats, scratch), nprocs=ranks)
        found = json.loads((Path(scratch) / "found.json").read_text())
    table = []
    for index, row in enumerate(rows):
        seconds = [times[index] for times in found["times"]]
        sent, by_choice, by_rank = found["bytes"][index]
        table.append(
            {
                "ranks": ranks,
                "model": row.name,
                "step_s": statistics.median(seconds),
                "over_dense": statistics.median(times[index] / times[0] for times in found["times"]),
                "over_floor": statistics.median(seconds) / (found["flops"][index] / found["rate"]),
                "sent_mib": sent / 2**20,
                "over_rows_of_choices": sent / by_choice if by_choice else None,
                "over_rows_of_ranks": sent / by_rank if by_rank else None,
                "seconds": seconds,
            }
        )
    return table


COLUMNS = ("ranks", "model", "step s", "x dense", "x floor", "MiB sent", "x choices", "x ranks")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = [row[key] for key in ("over_rows_of_choices", "over_rows_of_ranks")]
    return (
        str(row["ranks"]),
        row["model"],
        f"{row['step_s']:.3f}",
        f"{row['over_dense']:.2f}",
        f"{row['over_floor']:.2f}",
        f"{row['sent_mib']:.2f}",
        *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
    )


def line(texts: Sequence[str]) -> str:
    return f"{texts[0]:>5}  {texts[1]:<16}" + "".join(f"{text:>11}" for text in texts[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{ROWS} x {SEQ_LEN} tokens a rank, {CORES} cores\n{line(COLUMNS)}", flush=True)
    for ranks, chosen in ((1, (DENSE, *MIXTURES)), (2, (DENSE, *MIXTURES, *SHARED))):
        for row in measured(ranks, chosen, options.repeats):
            rows.append(row)
            print(line(cells(row)), flush=True)
    if options.json:
        about = {"date": date.today().isoformat(), "cores": CORES, "python": platform.python_version()}
        record = {**about, "torch": torch.__version__, "tokens_per_rank": ROWS * SEQ_LEN, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    wasteful = [row for row in rows if (row["over_rows_of_choices"] or 1.0) > LIMIT]
    for row in wasteful:
        print(f"{row['model']} on {row['ranks']} ranks sends more than a row for each choice")
    return 1 if wasteful else 0


if __name__ == "__main__":
    sys.exit(main())
