"""Checkpoints: time to save and to load against a plain copy and read, cost of checksums, stall, and memory.

The state is float32 parameters with AdamW's two moments, 1 GiB together, on one rank and spread over two. Everything
goes through CheckpointManager. Works of a group alternate, in another order each time; each starts after a sync of the
disk and takes as long as its slowest rank; medians with the fastest and slowest, and median ratios to the floor beside
it. One round before the first warms up. GB are 10^9 bytes.

    save        write, checksum, flush, publish; floors: copying the same files, and writing the same memory, flushed
    checksums   saves with and without a hash in turn, PAIRS of them, as ratios: half of them lie between the quartiles.
                Once more on a memory disk, where writing hides least of it; and the hash of the state alone, which is
                the most that it can take where a core is free for it
    load        verify and read; floor: reading the same bytes once into memory. Cold: the files' pages were dropped
                from the page cache of this machine (what lies under a virtual disk may still hold them)
    stall       time that training waits for a save; floor: one copy of the state into memory that is there
    memory      highest resident memory over what the process had before its state, over the state; a process for each
    growth      resident memory after 20, 100 and 200 saves of a small state in the background

    python benchmarks/checkpoint.py [--repeats 7] [--folder /tmp] [--json benchmarks/results/checkpoint.json]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from torchtitan_lite.checkpoint import shards, storage
from torchtitan_lite.checkpoint.manager import CheckpointManager, Progress
from torchtitan_lite.config.schema import Checkpoint

CORES = len(os.sched_getaffinity(0))
MEMORY_DISK = Path("/dev/shm")
ROWS, COLUMNS, MATRICES = 5464, 1024, 16  # x 3 x 4 bytes: 1 GiB
SMALL_ROWS = 32  # 6 MiB together
PAIRS = 15
SAVES, MARKS = 200, (20, 100, 200)
MEMORY_LIMIT, CHECKSUM_LIMIT, GROWTH_LIMIT_MIB = 1.3, 1.03, 16
BLOCK = 1 << 24
GIB, GB = 1 << 30, 1e9
MODES = ("disabled", "async", "async_with_pinned_mem")


class State(nn.Module):
    """Parameters of a run, this rank's rows of them."""

    def __init__(self, rows: int, ranks: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None
        for index in range(MATRICES):
            local = torch.rand(rows // ranks, COLUMNS)
            whole = local if mesh is None else DTensor.from_local(local, mesh, [Shard(0)])
            self.register_parameter(f"matrix{index}", nn.Parameter(whole))


class Run:
    """A state and its checkpoints in `folder`, as a trainer has them."""

    def __init__(self, folder: Path, mode: str = "disabled", rows: int = ROWS, like: "Run | None" = None) -> None:
        ranks = dist.get_world_size()
        self.model = State(rows, ranks) if like is None else like.model
        self.optimizer = torch.optim.AdamW(self.model.parameters()) if like is None else like.optimizer
        record = {"mesh": {"dp_shard": ranks}, "global_batch_size": 8, "identity": {"model": {"name": "benchmark"}}}
        section = Checkpoint(enable=True, async_mode=mode, keep_latest_k=0)  # type: ignore[arg-type]
        self.folder, self.step = folder, 0
        self.manager = CheckpointManager(
            section, folder, self.model, self.optimizer, record, 0, lambda *_, **__: None, {}
        )

    def make_moments(self) -> None:
        for parameter in self.model.parameters():
            moments = {key: torch.empty_like(parameter).detach() for key in ("exp_avg", "exp_avg_sq")}
            for moment in moments.values():
                shards.part_of(moment).local.uniform_()
            self.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}

    def tensors(self) -> list[Tensor]:
        return [shards.part_of(tensor).local for tensor in self.manager._tensors(model_only=False).values()]

    def save(self) -> float:
        """Save once and wait for the end of it; return seconds of those that training would have waited."""
        self.step += 1
        self.manager.save(Progress(self.step))
        outcome = self.manager.saver.outcome()
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        return outcome.stalled

    def latest(self) -> Path:
        return storage.step_folder(self.folder, self.step)

    def load(self) -> None:
        if self.manager.resume() is None:
            raise RuntimeError(f"{self.folder} has no checkpoint")


class NoHash:
    def update(self, block: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 32


def save_with(run: Run, hasher: Callable[[], Any]) -> None:
    shards.hasher = hasher
    try:
        run.save()
    finally:
        shards.hasher = storage.hasher


def with_and_without(run: Run) -> dict[str, Callable[[], Any]]:
    return {
        "save": lambda: save_with(run, storage.hasher),
        "save without checksums": lambda: save_with(run, NoHash),
    }


def hash_all(tensors: Sequence[Tensor]) -> None:
    digest = storage.hasher()
    for tensor in tensors:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    flush(target)


def write_memory(tensors: Sequence[Tensor], target: Path) -> None:
    with target.open("wb", buffering=0) as handle:
        for tensor in tensors:
            rest = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B")
            while rest:
                rest = rest[handle.write(rest[:BLOCK]) :]
    flush(target)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_file(path: Path, into: bytearray) -> None:
    rest = memoryview(into)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(rest[:BLOCK]):
            rest = rest[count:]


def forget_pages(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def slowest(work: Callable[[], Any]) -> float:
    """Seconds of the slowest rank, or of the waits that the work itself returns."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    started = time.perf_counter()
    told = work()
    took = torch.tensor(told if isinstance(told, float) else time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def alternated(works: Mapping[str, Callable[[], Any]], repeats: int, between: Callable[[], None]) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            took = slowest(works[name])
            between()
            if repeat > 0:
                times[name].append(took)
    return times


def times_on_rank(folder: Path, repeats: int) -> dict[str, Any]:
    run = Run(folder / "kept")
    run.make_moments()
    run.save()
    others = {mode: Run(folder / mode, mode, like=run) for mode in MODES}
    own, scratch = run.latest() / storage.file_of(dist.get_rank()), folder / f"scratch{dist.get_rank()}"
    buffer = bytearray(own.stat().st_size)
    tensors = run.tensors()
    there = [torch.zeros_like(tensor) for tensor in tensors]

    def copy_state() -> None:
        for target, tensor in zip(there, tensors, strict=True):
            target.copy_(tensor)

    def clear() -> None:
        dist.barrier()
        scratch.unlink(missing_ok=True)
        if dist.get_rank() == 0:
            for other in others.values():
                shutil.rmtree(other.latest(), ignore_errors=True)
        dist.barrier()

    def cold(work: Callable[[], Any]) -> Callable[[], float]:
        def timed() -> float:
            forget_pages(run.latest())
            dist.barrier()
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        return timed

    plain = others["disabled"]
    save = {
        "save": lambda: save_with(plain, storage.hasher),
        "copy of the files": lambda: copy_file(own, scratch),
        "write of the memory": lambda: write_memory(tensors, scratch),
    }
    stall = {**{mode: other.save for mode, other in others.items()}, "copy of the state": copy_state}
    load = {
        "load, cold": cold(run.load),
        "read, cold": cold(lambda: read_file(own, buffer)),
        "load, warm": run.load,
        "read, warm": lambda: read_file(own, buffer),
    }
    found = {"save": alternated(save, repeats, clear), "stall": alternated(stall, repeats, clear)}
    found["checksums"] = alternated(with_and_without(plain), PAIRS, clear)
    found["checksums"]["hash alone"] = [slowest(lambda: hash_all(tensors)) for _ in range(repeats)]
    found["load"] = alternated(load, repeats, lambda: None)
    return {**found, "bytes": sum(path.stat().st_size for path in run.latest().iterdir())}


def checksums_on_rank(folder: Path) -> dict[str, Any]:
    """On a memory disk."""
    run = Run(folder)
    run.make_moments()

    def clear() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(run.latest())
        dist.barrier()

    return alternated(with_and_without(run), PAIRS, clear)


def memory_on_rank(folder: Path, what: str) -> float:
    """Highest resident memory over what this process had before, over its own state."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest starts here
    before = status("VmRSS")
    run = Run(folder / "kept" if what == "load" else folder / what, "disabled" if what == "load" else what)
    if what == "load":
        run.load()
    else:
        run.make_moments()
        run.save()
        run.save()
    own = sum(tensor.numel() * tensor.element_size() for tensor in run.tensors())
    ratio = torch.tensor((status("VmHWM") - before) / own, dtype=torch.float64)
    dist.all_reduce(ratio, dist.ReduceOp.MAX)
    return ratio.item()


def growth_on_rank(folder: Path, mode: str) -> list[float]:
    """Resident MiB after so many saves as MARKS says."""
    run = Run(folder / f"small-{mode}", mode, SMALL_ROWS)
    run.make_moments()
    marks = []
    for save in range(1, SAVES + 1):
        run.save()
        shutil.rmtree(run.latest())
        if save in MARKS:
            marks.append(status("VmRSS") / (1 << 20))
    return marks


def status(key: str) -> int:
    """Bytes, from what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def on_rank(rank: int, ranks: int, work: Callable[..., Any], arguments: Sequence[Any], meeting: Path) -> None:
    torch.set_num_threads(max(1, CORES // ranks))
    wait = timedelta(seconds=180)
    dist.init_process_group("gloo", f"file://{meeting}/meet", rank=rank, world_size=ranks, timeout=wait)
    found = work(*arguments)
    if rank == 0:
        (meeting / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(on_rank, (ranks, work, arguments, Path(meeting)), nprocs=ranks)
        return json.loads((Path(meeting) / "found.json").read_text())


def measured(ranks: int, repeats: int, folder: Path) -> dict[str, Any]:
    found = on_ranks(ranks, times_on_rank, folder, repeats)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as memory_disk:
        found["checksums in memory"] = on_ranks(ranks, checksums_on_rank, Path(memory_disk))
    found["memory"] = {}
    for what in ("load", *MODES):
        found["memory"][what] = on_ranks(ranks, memory_on_rank, folder, what)
        shutil.rmtree(folder / what, ignore_errors=True)
    return found


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, floor, strict=True))


FLOORS = {
    "save": "copy of the files",
    "stall": "copy of the state",
    "checksums": "save without checksums",
    "checksums in memory": "save without checksums",
}


def show(ranks: int, found: dict[str, Any]) -> None:
    print(f"{ranks} rank{'s' * (ranks > 1)}, {found['bytes'] / GIB:.3f} GiB")
    print(f"  {'':<46}{'median s':>9}{'fastest':>9}{'slowest':>9}{'GB/s':>7}{'x floor':>9}")
    for group in (*FLOORS, "load"):
        for name, times in found[group].items():
            floor = found[group][FLOORS.get(group) or name.replace("load", "read")]
            median = statistics.median(times)
            cells = f"{median:>9.3f}{min(times):>9.3f}{max(times):>9.3f}{found['bytes'] / GB / median:>7.2f}"
            over = f"{ratio(times, floor):>9.3f}" if len(times) == len(floor) else ""
            print(f"  {group + ': ' + name:<46}{cells}{over}")
    for what, peak in found["memory"].items():
        print(f"  {'memory: ' + what:<46}{peak:>9.3f} x own state")


def checksum_cost(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Quartiles of the ratios of saves with checksums to those without beside them."""
    pairs = zip(times["save"], times["save without checksums"], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return {"low": low, "median": middle, "high": high}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, failed = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for ranks in (1, 2):
            folder = Path(scratch) / str(ranks)
            folder.mkdir()
            found = measured(ranks, options.repeats, folder)
            shutil.rmtree(folder)
            show(ranks, found)
            costs = {group: checksum_cost(found[group]) for group in ("checksums", "checksums in memory")}
            for group, cost in costs.items():
                print(f"  {group}: {cost['median']:.3f} x, quartiles {cost['low']:.3f} and {cost['high']:.3f}")
            rows.append({"ranks": ranks, "checksum_ratios": costs, **found})
            if (peak := found["memory"]["load"]) > MEMORY_LIMIT:
                failed.append(f"loading on {ranks} ranks takes {peak:.2f} x the rank's state, more than {MEMORY_LIMIT}")
            if costs["checksums"]["low"] > CHECKSUM_LIMIT:
                failed.append(f"saves on {ranks} ranks take more than {CHECKSUM_LIMIT} x those without checksums")
        growth = {mode: on_ranks(1, growth_on_rank, Path(scratch), mode) for mode in MODES[1:]}
    for mode, marks in growth.items():
        told = ", ".join(f"{mib:.0f} after {count}" for mib, count in zip(marks, MARKS, strict=True))
        print(f"{mode}: resident MiB {told} saves")
        if marks[-1] - marks[0] > GROWTH_LIMIT_MIB:
            failed.append(f"{mode}: memory grows with saves")
    if options.json:
        about = {"date": date.today().isoformat(), "cores": CORES, "python": platform.python_version()}
        about |= {"torch": torch.__version__, "load_1min": os.getloadavg()[0], "repeats": options.repeats}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "growth_mib": growth, "rows": rows}, indent=1) + "\n")
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
