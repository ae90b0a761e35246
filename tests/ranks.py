"""A pool of rank processes that lives for the pytest session.

`pool.run(function, ranks, *args)` runs a module-level function on each rank of a gloo group and returns the
ranks' results in order. A process starts once, imports torch once, and serves every test.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_WHOLE = 25  # runs, after which the collector looks at all objects again
_GRACE_S = 5.0  # for the other ranks, once one has failed
_START_S = 120.0  # for a process to start and import torch


class RankError(AssertionError):
    """A rank raised, died or did not come back; the message names it."""


class _BrokenHeapError(RankError):
    """A rank process that had served other runs died of what they, or a library, had done to its memory."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    stacks: Path  # where it writes the stacks of its threads on SIGUSR1
    served: int = 0  # runs


class RankPool:
    """Rank processes by spawn, made as tests ask for them and replaced when they are lost.

    Ranks meet through a store in this process, a new one on a free port for each run, so that nothing of one
    run can reach the next.
    """

    def __init__(self, max_ranks: int) -> None:
        self.max_ranks = max_ranks
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._repeated = False

    def run(
        self, function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, group: bool = True
    ) -> list[Any]:
        """Results of `function(*args)` on ranks 0 ... ranks - 1.

        group: with a gloo process group up; without, the environment is as torchrun leaves it. Raises RankError
        with the traceback of the rank that failed first, or with the stacks of those that hang. A process that dies of
        SIGSEGV or SIGABRT after other runs may do so for their sake: once in a session the run is repeated, with a
        warning, by new processes, which have no such excuse.
        """
        assert ranks <= self.max_ranks, f"{ranks} ranks asked for, --max-ranks is {self.max_ranks}"
        try:
            return self._run(function, ranks, args, timeout, group)
        except _BrokenHeapError as error:
            if self._repeated:
                raise
            self._repeated = True
            warnings.warn(f"repeated in new processes, once in a session: {error}", stacklevel=2)
            for worker in self._workers.values():
                worker.process.kill()
                worker.process.join()
            return self._run(function, ranks, args, timeout, group)

    def _run(
        self, function: Callable[..., Any], ranks: int, args: tuple[Any, ...], timeout: float, group: bool
    ) -> list[Any]:
        from torch.distributed import TCPStore

        self._start(ranks)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = [self._workers[rank] for rank in range(ranks)]
        for rank, worker in enumerate(workers):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's, as under torchrun
            }
            worker.connection.send((function, args, environment, group, timeout))
            worker.served += 1
        return self._collect(workers, getattr(function, "__name__", str(function)), timeout)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.join()
        self._workers.clear()
        self._folder.cleanup()

    def _start(self, ranks: int) -> None:
        # A process keeps its rank for life: torch caches what follows from one (DTensor's offsets).
        fresh = {
            rank: self._spawn(rank)
            for rank in range(ranks)
            if rank not in self._workers or not self._workers[rank].process.is_alive()
        }
        self._workers.update(fresh)
        for worker in fresh.values():
            if not worker.connection.poll(_START_S) or worker.connection.recv() != "ready":
                raise RankError(f"a rank process did not start within {_START_S:.0f} s")

    def _spawn(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        stacks = Path(self._folder.name) / f"stacks-{index}-{time.monotonic_ns()}"
        process = self._context.Process(target=_serve, args=(theirs, str(stacks)), name=f"rank-{index}", daemon=True)
        # Read when torch is imported, so before the process starts.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        return _Worker(process, ours, stacks)

    def _collect(self, workers: list[_Worker], name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []  # (when it was raised, what)
        deadline = time.monotonic() + timeout
        broken = False
        while len(results) < len(workers) and (left := deadline - time.monotonic()) > 0:
            waiting = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in results}
            for connection in wait(list(waiting), timeout=left):
                rank = waiting[connection]  # type: ignore[index]
                try:
                    failed_at, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    workers[rank].process.join(_GRACE_S)
                    code = workers[rank].process.exitcode
                    failed_at, value = 0.0, f"the process died with exit code {code}"
                    broken = broken or (code in (-signal.SIGSEGV, -signal.SIGABRT) and workers[rank].served > 1)
                results[rank] = value
                if failed_at is not None:
                    failures.append((failed_at, f"{name}: rank {rank} of {len(workers)} failed:\n{value}"))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if missing := [rank for rank in range(len(workers)) if rank not in results]:
            hang = "".join(f"\nrank {rank} is at:\n{self._stacks(workers[rank])}" for rank in missing)
            for rank in missing:
                workers[rank].process.kill()
                workers[rank].process.join()
            failures = failures or [
                (0.0, f"{name}: ranks {missing} of {len(workers)} hang after {timeout:.0f} s{hang}")
            ]
        if failures:
            # The first to fail is the cause; the others lost their peer.
            raise (_BrokenHeapError if broken else RankError)(min(failures)[1])
        return [results[rank] for rank in range(len(workers))]

    def _stacks(self, worker: _Worker) -> str:
        os.kill(worker.process.pid or 0, signal.SIGUSR1)
        for _ in range(50):  # it answers from a signal handler, there is nothing to wait on
            time.sleep(0.1)
            if worker.stacks.exists() and (told := worker.stacks.read_text()):
                return told
        return "(no answer)"


def _serve(connection: Connection, stacks: str) -> None:
    """The life of a rank process: take a function, run it, send back (None, result) or (when it failed, traceback)."""
    import torch

    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = Path(stacks).open("w")  # noqa: SIM115  # open as long as the process lives
    torch.set_num_threads(1)
    connection.send("ready")
    for number in count():
        try:
            function, args, environment, group, timeout = connection.recv()
        except EOFError:
            sys.exit(0)
        os.environ.update(environment)
        _set_aside(everything=number % _WHOLE == 0)
        # Each time: a run holds this signal too, and leaves it with Python's handler.
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.register(signal.SIGUSR1, file=handle, all_threads=True)
        try:
            connection.send((None, _run(function, args, group, timeout)))
        except BaseException as error:
            failed_at = getattr(error, "failed_at", time.monotonic())
            connection.send((failed_at, traceback.format_exc()))


def _set_aside(everything: bool) -> None:
    """Have the collector pass over what is there before a run, modules most of all: looking at all of it, twice a run,
    took longer than most runs. everything: look at what was set aside before, which may be garbage by now."""
    if everything:
        gc.unfreeze()
    gc.collect()  # what a run that failed has left, and its traceback kept
    gc.freeze()


def _run(function: Callable[..., Any], args: tuple[Any, ...], group: bool, timeout: float) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    if group:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        return function(*args)
    except BaseException as error:
        error.failed_at = time.monotonic()  # type: ignore[attr-defined]  # before the group goes and takes peers down
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # A start that failed has counted: its rank would meet the others of the next run under another name.
        dist.distributed_c10d._world.group_count = 0
        _forget_meshes()
        # Last, and whatever training did to the collector: what a run leaves keeps the threads of its process groups,
        # which poll.
        gc.collect()


def _forget_meshes() -> None:
    """DTensor caches by mesh shape what names process groups; those of the next run have other names.

    Compiled graphs name them too, and count against a limit for each function.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo

    MeshTopoInfo.build_from_mesh.cache_clear()
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    torch._C._clear_DTensor_sharding_propagator_cache()
