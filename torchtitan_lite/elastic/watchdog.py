"""Ends a hang, and says in plain words who waits for whom: a thread on each rank that the training loop keeps awake."""

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn

from torchtitan_lite.config.schema import Comm
from torchtitan_lite.distributed.job_store import connect
from torchtitan_lite.distributed.runtime import RECORDED, Runtime, from_first_rank, recorded_collectives
from torchtitan_lite.elastic.stacks import all_stacks, located
from torchtitan_lite.elastic.stall_report import Account, Limit, report
from torchtitan_lite.observability import phases

_ANSWER_S = 2.0  # for the other ranks' accounts
_SPEAK_S = 5.0  # for the rank that reports, before torchrun ends it with the first that leaves
_LAST_RESORT_S = 15.0  # a disk or a store that hangs too must not keep a rank
_ENDED = "ended"  # a rank that tells nothing more, and rightly
_STORE_TIMEOUT = timedelta(seconds=10)

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches one rank from `with` to its end.

    The loop calls `beat` where a phase begins; one that comes forward no more for comm.init_timeout_seconds, after
    `tighten` for comm.train_timeout_seconds, has hung: all ranks give an account of themselves, the first one that
    answers prints a line and writes event "stall", and all end with exit code 1. So they do where one of them tells the
    job's store nothing for as long. event: writes a line of events.jsonl. folder: of the run.
    """

    def __init__(self, comm: Comm, folder: Path, here: Runtime, event: Callable[..., None]) -> None:
        self._comm, self._here, self._event = comm, here, event
        self._traces = folder / comm.save_traces_folder
        self._limit = Limit("comm.init_timeout_seconds", comm.init_timeout_seconds)
        self._step, self._beat, self._paused = 0, ("starting", time.monotonic()), False
        self._watched, self._host = threading.get_ident(), socket.gethostname()
        self._wake, self._hush = threading.Event(), threading.Event()
        self._closing, self._spoken = False, False
        self._account: Account | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        """Collective."""
        # The store outlives this start: see job_store.
        self._prefix = f"watchdog/{from_first_rank(os.urandom(8).hex())}"
        self.beat("starting")
        works = [self._watch] if "MASTER_ADDR" not in os.environ else [self._watch, self._talk]
        self._threads = [threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing = True
        self._wake.set()
        self._hush.set()
        for thread in self._threads:
            thread.join(_SPEAK_S)

    def begin(self, step: int) -> None:
        self._step = step
        self.beat("loading data")

    def beat(self, phase: str) -> None:
        self._beat = (phase, time.monotonic())
        phases.begin(phase, self._step)

    def at(self) -> tuple[str, int]:
        """The phase and the step that this rank is at."""
        return self._beat[0], self._step

    def tighten(self) -> None:
        """From now on nothing waits for a compiler any more."""
        self._limit = Limit("comm.train_timeout_seconds", self._comm.train_timeout_seconds)

    def watch(self, parts: Iterable[nn.Module]) -> None:
        """Let each forward of `parts` count too: a step of many micro-batches may take longer than the limit."""
        for part in parts:
            part.register_forward_pre_hook(lambda *_: self.beat(self._beat[0]), prepend=True)

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Within it there is no limit to how long this rank takes; the next one must be heard of."""
        before, self._paused, outer = self._paused, True, self._beat[0]
        self.beat(phase)
        try:
            yield
        finally:
            self.beat(phase)
            self._paused = before
            phases.begin(outer if before else "", self._step)

    def _watch(self) -> None:
        """Until the loop is idle for too long, or another rank calls."""
        seen, idle, last = self._beat, 0.0, time.monotonic()
        while not self._wake.wait(tick := min(1.0, self._limit.seconds / 20)):
            now = time.monotonic()
            fresh = self._paused or self._beat is not seen
            # A process that was stopped and goes on has not hung: its own clock stood still.
            idle = 0.0 if fresh else idle + min(now - last, 3 * tick)
            seen, last = self._beat, now
            if idle >= self._limit.seconds:
                break
        if not self._closing:
            self._end()

    def _end(self) -> None:
        last_resort = threading.Timer(_LAST_RESORT_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        try:
            phase, since = self._beat
            stack = sys._current_frames().get(self._watched)
            where, collective = located(stack)
            seconds = time.monotonic() - since
            here = Account(self._here.rank, self._host, self._step, phase, seconds, True, where, collective)
            self._account = here
            self._hush.set()
            self._write_stacks(here)
            for thread in self._threads[1:]:
                thread.join(_ANSWER_S + _SPEAK_S + 1.0)
            if not self._spoken:
                self._speak([here], alone=self._here.world_size > 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _write_stacks(self, here: Account) -> None:
        folder = self._folder_of(here.step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{here.rank}.txt").write_text(all_stacks(self._watched), encoding="utf-8")
            if (recorded := recorded_collectives()) is not None:
                name = f"{RECORDED}{here.rank}" + ("" if dist.get_backend() != "gloo" else ".json")
                (folder / name).write_bytes(recorded)
        except OSError as error:
            print(f"error: {folder}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def _folder_of(self, step: int) -> Path:
        return self._traces / f"step-{step}"

    def _speak(self, accounts: list[Account], alone: bool = False) -> None:
        self._spoken = True
        step = min(account.step for account in accounts if account.answered)
        line = report(accounts, self._limit, f"{self._folder_of(step)}/", alone)
        print(line, file=sys.stderr, flush=True)
        self._event("stall", step, report=line, ranks=[asdict(account) for account in accounts])

    def _talk(self) -> None:
        """Tell the job's store how this rank is doing, and hear of a stall elsewhere.

        In a thread and with a connection of its own: the store may hang as well, and what the loop's connection waits
        for may be what never comes.
        """
        try:
            store = connect(_STORE_TIMEOUT)
            told, every = -float("inf"), min(10.0, self._comm.train_timeout_seconds / 5)
            heard = _Heard(self._last_of((self._here.rank + 1) % self._here.world_size))
            while True:
                if time.monotonic() - told >= every:
                    told = time.monotonic()
                    self._tell(store, self._beat[0])
                    # Where there is no limit this rank may wait for one that is gone, its cable pulled.
                    if heard.silent_s(store) > self._limit.seconds and self._paused:
                        self._wake.set()
                if store.check([f"{self._prefix}/called"]):
                    self._wake.set()
                if self._hush.wait(min(1.0, every)):
                    break
            if self._closing:
                self._tell(store, _ENDED)
            elif self._account is not None:
                self._gather(store, self._account)
        except RuntimeError as error:
            logger.warning("the watchdog has lost the job's store: %s", error)

    def _tell(self, store: dist.Store, phase: str) -> None:
        last = {"host": self._host, "step": self._step, "phase": phase, "time": time.time()}
        store.set(self._last_of(self._here.rank), json.dumps(last))

    def _last_of(self, rank: int) -> str:
        return f"{self._prefix}/last/{rank}"

    def _gather(self, store: dist.Store, here: Account) -> None:
        """Give this rank's account, take the others' where it is the first that answers, and say what they make."""
        ranks, rank, prefix = self._here.world_size, self._here.rank, self._prefix
        store.set(f"{prefix}/account/{rank}", json.dumps(asdict(here)))
        store.set(f"{prefix}/called", "yes")
        store.add(f"{prefix}/answers", 1)
        _until(lambda: store.add(f"{prefix}/answers", 0) >= ranks, _ANSWER_S)
        first = next(other for other in range(rank + 1) if store.check([f"{prefix}/account/{other}"]))
        if first == rank and store.add(f"{prefix}/speakers", 1) == 1:
            self._speak([self._heard_of(store, other) for other in range(ranks)])
            store.set(f"{prefix}/spoken", "yes")
        else:
            self._spoken = _until(lambda: store.check([f"{prefix}/spoken"]), _SPEAK_S)

    def _heard_of(self, store: dist.Store, rank: int) -> Account:
        if store.check([key := f"{self._prefix}/account/{rank}"]):
            return Account(**json.loads(store.get(key)))
        if not store.check([key := self._last_of(rank)]):
            return Account(rank, "", 0, "", -1.0, answered=False)
        last: dict[str, Any] = json.loads(store.get(key))
        ago = max(0.0, time.time() - last["time"])
        return Account(rank, last["host"], last["step"], last["phase"], ago, answered=False)


class _Heard:
    """What a rank tells the store, and for how long it has told nothing new, by this rank's clock."""

    def __init__(self, key: str) -> None:
        self._key, self._last, self._at = key, b"", time.monotonic()

    def silent_s(self, store: dist.Store) -> float:
        if store.check([self._key]) and (last := store.get(self._key)) != self._last:
            self._last, self._at = last, time.monotonic()
        ended = bool(self._last) and json.loads(self._last)["phase"] == _ENDED
        return 0.0 if ended else time.monotonic() - self._at


def _until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait until it is, at most so long."""
    deadline = time.monotonic() + seconds
    while not (is_true := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return is_true
