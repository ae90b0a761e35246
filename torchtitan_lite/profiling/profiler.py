"""Traces torch's profiler over windows of steps, on every rank at once, and says where their time went."""

import gc
import gzip
import json
import logging
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from torchtitan_lite.config.schema import Profiling
from torchtitan_lite.distributed.runtime import Runtime, patient_group, settle
from torchtitan_lite.elastic.watchdog import Watchdog
from torchtitan_lite.observability.metrics import StepClock
from torchtitan_lite.observability.sinks import RunLog
from torchtitan_lite.profiling.breakdown import KINDS, STEP, step_breakdown
from torchtitan_lite.profiling.memory import write_snapshot
from torchtitan_lite.profiling.windows import Window, window_at
from torchtitan_lite.strict_json import strict_dumps

logger = logging.getLogger(__name__)

_FASTEST = 1  # of gzip's levels: a tenth of the size all the same, in a quarter of the time


class Profiler:
    """Told by the training loop of each step's begin and end; between windows it does nothing.

    steps: of the whole run. watchdog, clock: paused while files are written. group: of all ranks, None where no trace
    is asked for. To make one is collective.
    """

    def __init__(
        self,
        section: Profiling,
        folder: Path,
        steps: int,
        here: Runtime,
        log: RunLog,
        watchdog: Watchdog,
        clock: StepClock,
    ) -> None:
        self._section, self._folder, self._steps = section, folder, steps
        self._here, self._log, self._watchdog, self._clock = here, log, watchdog, clock
        self.group = patient_group() if section.enable_profiling else None
        self._profile: Any = None
        self._window: Window | None = None
        self._next = 0
        self._marked = ExitStack()

    def begin(self, step: int) -> None:
        if not self._section.enable_profiling:
            return
        if self._window is not None and step != self._next:
            self.close()  # rolled back: other steps come first
        if self._window is None:
            window = window_at(self._section, step, self._steps)
            if window is None or step > window.active:
                return
            self._window, self._next = window, step
            self._start(window.active - step, window.last - window.active + 1)
        if step >= self._window.active:
            settle(self._here.device)
            self._marked.enter_context(record_function(f"{STEP}{step}"))

    def ended(self, step: int, *, stopping: bool) -> None:
        """stopping: the run ends here; what is left to write would be taken from the time that it has for saving."""
        snapshot = self._section.enable_memory_snapshot and step % self._section.profile_freq == 0
        if self._window is None and not snapshot:
            return
        if stopping:
            self.close()
            return
        if self._window is not None:
            self._end_step(step, self._window)
        if snapshot:
            with self._clock.paused(), self._watchdog.paused("writing a snapshot of memory"):
                write_snapshot(self._folder / self._section.save_memory_snapshot_folder, str(step), self._here.rank)

    def close(self) -> None:
        """Let go of a window that has not come to its end."""
        if self._window is not None:
            logger.info("the trace of steps %d to %d is left out", self._window.active, self._window.last)
            self._window = None
            try:
                self._marked.close()
                self._profile.stop()
            except RuntimeError as error:  # of a device that has failed: what has ended the run is to be told
                logger.warning("the profiler could not be stopped: %s", error)
            self._forget()

    def _start(self, warmup: int, active: int) -> None:
        # Or the profiler prints lines of its own.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self._here.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=active, repeat=1) if warmup else None,
            record_shapes=True,
        )
        self._profile.start()

    def _end_step(self, step: int, window: Window) -> None:
        if step >= window.active:
            settle(self._here.device)
            self._marked.close()
        if step < window.last:
            self._profile.step()
            self._next = step + 1
            return
        self._window = None
        with self._clock.paused(), self._watchdog.paused("writing a trace"):
            self._write(window)
            self._forget()

    def _forget(self) -> None:
        """Free what the profiler has seen: its parts hold each other, and the collector runs seldom in training."""
        self._profile = None
        gc.collect(1)

    def _write(self, window: Window) -> None:
        """Write this rank's trace, and tell the first rank where its time went. Collective."""
        started, folder = time.perf_counter(), self._traces / f"iteration_{window.last}"
        self._profile.stop()
        own, error = None, None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = step_breakdown(_written(self._profile, folder / f"rank{self._here.rank}_trace.json"))
            (folder / f"rank{self._here.rank}_breakdown.json").write_text(strict_dumps(own, indent=1) + "\n")
        except (OSError, RuntimeError, ValueError) as failure:
            # Only this rank knows, and the others wait for it.
            error = f"rank {self._here.rank}: {failure}"
        every: list[Any] = [None] * self._here.world_size
        dist.all_gather_object(every, (own, error), group=self.group)
        if self._here.rank == 0:
            self._tell(window, folder, dict(enumerate(every)), time.perf_counter() - started)

    @property
    def _traces(self) -> Path:
        return self._folder / self._section.save_traces_folder

    def _tell(self, window: Window, folder: Path, every: dict[int, Any], seconds: float) -> None:
        for _, error in every.values():
            if error is not None:
                logger.warning("the trace of step %d could not be written: %s", window.last, error)
        ranks = {rank: own for rank, (own, _) in every.items() if own is not None}
        if not ranks:
            return
        mean = {kind: fmean(own[kind] for own in ranks.values()) for kind in KINDS}
        busiest = max(ranks, key=lambda rank: ranks[rank]["compute_s"])
        self._log.event(
            "profile",
            window.last,
            step_breakdown=mean,
            steps=[window.active, window.last],
            ranks=len(ranks),
            most_compute={"rank": busiest, **ranks[busiest]},
            folder=str(folder),
            seconds=seconds,
        )
        most = f", means of {len(ranks)} ranks; rank {busiest} computed most, {ranks[busiest]['compute_s']:.3f} s"
        logger.info(
            "profiled  %.3f s a step = %.3f compute + %.3f exposed communication + %.3f copies + %.3f idle%s; %s, "
            "written in %.1f s",
            sum(mean.values()),
            *mean.values(),
            most if len(ranks) > 1 else "",
            folder,
            seconds,
        )


def _written(profile: Any, path: Path) -> list[dict[str, Any]]:
    """Write a trace to `path` and .gz, and return its events."""
    profile.export_chrome_trace(str(path))
    try:
        with path.open("rb") as plain:
            events: list[dict[str, Any]] = json.load(plain)["traceEvents"]
            plain.seek(0)
            with gzip.open(f"{path}.gz", "wb", compresslevel=_FASTEST) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
    finally:
        path.unlink(missing_ok=True)
    return events
