"""What is known of a run from the lines in its folder, kept up to date by reading what is new of them. No torch."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.fields import NUMBER, SECONDS, TEXT, WHOLE, Kind, fields
from torchtitan_lite.observability.sinks import parsed

RECENT = 50  # records that times are taken from: the first steps of a long run say nothing of its next ones

# Events that a user should hear of, and what of each says why.
_TROUBLES = {
    "stall": "report",
    "stopped by faults": "why",
    "silent corruption": "why",
    "checkpoint failed": "error",
    "bad checkpoint": "why",
    "roll back": "checkpoint",
}
# Those that end an attempt without its being asked to.
FAILURES = ("stall", "stopped by faults", "silent corruption")

_OF_A_LINE = {"step": WHOLE, "loss": NUMBER, "step_time_s": SECONDS}
_ALSO_OF_A_LINE = {"attempt": WHOLE} | dict.fromkeys(("grad_norm", "lr", "tps", "mfu", "memory_peak_gib"), NUMBER)
_OF_EVENTS = {"event": TEXT, "time": SECONDS, "step": WHOLE}
# By the name of the event: what it must have besides, and what it may have.
_OF_EVENT: dict[str, tuple[dict[str, Kind], dict[str, Kind]]] = {
    "start": ({}, {"attempt": WHOLE, "world_size": WHOLE, "mesh": TEXT, "host": TEXT}),
    "world-size change": ({"before": WHOLE, "now": WHOLE}, {}),
    "validation": ({"loss": NUMBER}, {}),
    "skipped step": ({}, {"why": TEXT}),
}


class Tail:
    """A JSON lines file that grows. A cut last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._lines, self._inode = path, 0, 0, 0
        self.changed_at: float | None = None  # by the file system's clock, seconds since 1970; None: no line yet

    def replaced(self) -> bool:
        """Whether what was read is no longer the beginning of what is there: the folder is another run's now."""
        if not self._offset:
            return False
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return True
        return found.st_ino != self._inode or found.st_size < self._offset

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """(file and line, record) of the lines that have been completed since the last call. Raises UserError."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, _, _ = file.read().rpartition(b"\n")
                if not whole:
                    return []
                found = self.path.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}; mend it or its permissions") from None
        self._offset, self._inode, self.changed_at = self._offset + len(whole) + 1, found.st_ino, found.st_mtime
        records = []
        for line in whole.split(b"\n"):
            self._lines += 1
            records.append((f"{self.path}, line {self._lines}", parsed(line, self.path, self._lines)))
        return records


@dataclass
class RunView:
    """What the lines say.

    newest: what is known of the last record of metrics.jsonl, {} before the first. curve: (step, loss) of the records
    that count. times: step_time_s of recent records. between: steps between the last two records. start: the last event
    of that name. checkpoints: the events of saves. skipped: the events of skipped steps. sizes: (step, ranks before,
    ranks now). troubles: (time, text). validation: the last event of that name. ended: the event that ended the newest
    attempt, None while nothing did.
    """

    newest: dict[str, Any] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    between: int = 1
    start: dict[str, Any] | None = None
    attempts: int = 0
    saves: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    troubles: list[tuple[float, str]] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    ended: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """The last one that was logged or gone back to."""
        return self.curve[-1][0] if self.curve else self.start["step"] if self.start else 0

    def step_time_s(self) -> float | None:
        """The middle one of recent step times; None before the first."""
        return median(self.times) if self.times else None

    def take_metrics(self, record: Mapping[str, Any], source: str) -> None:
        """Raises UserError for a record without what the view rests on. source: the file and the line."""
        known = fields(record, source, _OF_A_LINE, _ALSO_OF_A_LINE)
        step, loss, took = known["step"], known["loss"], known["step_time_s"]
        # After a resume steps come again: earlier lines of theirs, and of later steps, are superseded.
        while self.curve and self.curve[-1][0] >= step:
            self.curve.pop()
        if self.curve:
            self.between = step - self.curve[-1][0]
        if known["attempt"] != self.newest.get("attempt"):
            self.times.clear()  # other ranks, another speed
        self.curve.append((step, loss))
        self.times.append(took)
        self.newest = known

    def take_event(self, event: Mapping[str, Any], source: str) -> None:
        """Raises UserError for one without what the view rests on. source: the file and the line."""
        known = fields(event, source, _OF_EVENTS)
        name, at, step = known["event"], known["time"], known["step"]
        known |= fields(event, source, *_OF_EVENT.get(name, ({}, {})))
        if name == "start":
            self.start, self.ended, self.attempts = known, None, self.attempts + 1
        elif name == "validation":
            self.validation = known
        elif name == "skipped step":
            self.skipped.append(known)
        elif name == "world-size change":
            self.sizes.append((step, known["before"], known["now"]))
        elif name == "checkpoint":
            self.saves += 1
        if name in ("end", "preemption", *FAILURES):
            self.ended = known
        if name in _TROUBLES:
            self.troubles.append((at, f"{name} at step {step}: {event.get(_TROUBLES[name], '')}"))


class RunReader:
    """The view of one run folder. Another run that takes the folder's place is read from its beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        self.view = RunView()
        self._metrics, self._events = Tail(self.folder / "metrics.jsonl"), Tail(self.folder / "events.jsonl")

    def read(self) -> RunView:
        """The view as the files are now. Raises UserError where one cannot be read."""
        if self._metrics.replaced() or self._events.replaced():
            self._begin()
        for source, event in self._events.read():
            self.view.take_event(event, source)
        for source, record in self._metrics.read():
            self.view.take_metrics(record, source)
        return self.view

    @property
    def changed_at(self) -> float | None:
        """When the last line came, by the file system's clock; None before the first."""
        return max((tail.changed_at for tail in (self._metrics, self._events) if tail.changed_at), default=None)
