"""What a rank does when: phases/rank<R>.jsonl in the run folder, by the host's clock. No torch, no sync.

The training loop's phases come from the watchdog, which is told of each (`begin`); parts of one are marked with `span`.
Both do nothing unless a rank records.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_lite.observability.sinks import drop_cut_line
from torchtitan_lite.strict_json import strict_dumps

PHASES = "phases"  # the folder
_FLUSH_S = 5.0  # between writes: what a process that is killed may lose
# What the watchdog calls them in a sentence, and what they are called here; others keep their name.
_NAMES = {
    "loading data": "load",
    "forward and backward": "forward_backward",
    "clipping gradients": "clip",
    "optimizer step": "optimizer",
    "agreeing": "agree",
    "logging": "log",
    "saving a checkpoint": "checkpoint",
    "waiting for the save in flight": "checkpoint",
    "loading a checkpoint": "resume",
    "rolling back": "roll_back",
    "writing a trace": "profile",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clock:
    """From this rank's time.monotonic_ns to the wall clock of the first rank: add offset_ns. error_ns: it is off by no
    more, when it was measured; later clocks of different machines drift apart."""

    offset_ns: int
    error_ns: int


class _Recorder:
    def __init__(self, path: Path, clock: Clock, head: dict[str, Any]) -> None:
        self._path, self._offset = path, clock.offset_ns
        self._lines = [strict_dumps({**head, "host": os.uname().nodename, "clock_error_ns": clock.error_ns})]
        self._open: tuple[str, int, int] | None = None
        self._step, self._flushed, self._works = 0, time.monotonic(), True

    def begin(self, phase: str, step: int) -> None:
        name, now, self._step = _NAMES.get(phase, phase), time.monotonic_ns(), step
        if self._open is not None:
            if self._open[:2] == (name, step):
                return
            self.add(*self._open, now)
        self._open = (name, step, now) if name else None
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        step, began = self._step, time.monotonic_ns()
        try:
            yield
        finally:
            self.add(name, step, began, time.monotonic_ns())

    def add(self, phase: str, step: int, began: int, ended: int) -> None:
        at = self._offset
        self._lines.append(f'{{"phase": "{phase}", "step": {step}, "begin_ns": {began + at}, "end_ns": {ended + at}}}')

    def flush(self) -> None:
        lines, self._lines, self._flushed = self._lines, [], time.monotonic()
        if not lines or not self._works:
            return
        try:
            with self._path.open("ab") as handle:
                handle.write(("\n".join(lines) + "\n").encode())
        except OSError as error:
            self._works = False
            logger.warning("%s: cannot be written: %s; phases are recorded no more", self._path, error.strerror)


_recorder: _Recorder | None = None  # of this process's one training loop


@contextmanager
def recorded(folder: Path, rank: int, clock: Clock, **head: Any) -> Iterator[None]:
    """Within it this process records its phases. folder: of the run. head: what the attempt's first line says besides
    rank and clock."""
    global _recorder
    path = folder / PHASES / f"rank{rank}.jsonl"
    here = _Recorder(path, clock, {"rank": rank, **head})
    try:
        path.parent.mkdir(exist_ok=True)
        drop_cut_line(path)
        _recorder = here
    except OSError as error:
        logger.warning("%s: cannot be written: %s; phases are not recorded", path, error.strerror)
    try:
        yield
    finally:
        if _recorder is not None:
            _recorder = None
            here.begin("", 0)
            here.flush()


def begin(phase: str, step: int) -> None:
    """The loop goes over to this phase; empty: to none."""
    if _recorder is not None:
        _recorder.begin(phase, step)


def span(name: str) -> Any:
    """A context: a part of the phase that the loop is in."""
    return nullcontext() if _recorder is None else _recorder.span(name)


def recording() -> bool:
    return _recorder is not None
