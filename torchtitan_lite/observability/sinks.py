"""Where a run's records go: metrics.jsonl, events.jsonl, samples.jsonl and, where it is open, TensorBoard. One process
writes."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.strict_json import strict_dumps

if TYPE_CHECKING:
    from torchtitan_lite.observability.tensorboard import TensorBoard

LINE_FILES = ("metrics.jsonl", "events.jsonl", "samples.jsonl")


class RunLog:
    """The run folder's JSON lines; a line is one write and one flush, so that a killed run leaves whole lines.

    writes: whether this process is the one that does. attempt: starts of this run so far, this one included. board:
    draws them too, where it is open.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder, self.writes = folder, writes
        self.board: TensorBoard | None = None
        if writes:
            for name in LINE_FILES:
                drop_cut_line(folder / name)
        events = read_lines(folder / "events.jsonl")
        self.attempt = 1 + sum(event["event"] == "start" for event in events)
        self._before = [event for event in events if event.get("attempt") == self.attempt - 1]

    def metrics(self, record: dict[str, Any]) -> None:
        self._append("metrics.jsonl", {**record, "attempt": self.attempt})
        if self.board is not None:
            self.board.metrics(record)

    def event(self, event: str, step: int, **details: Any) -> None:
        self._append(
            "events.jsonl", {"event": event, "time": time.time(), "step": step, "attempt": self.attempt, **details}
        )
        if self.board is not None:
            self.board.event(event, step, details)

    def of_attempt_before(self, *names: str) -> dict[str, Any] | None:
        """The first event of the attempt before this one that has one of these names."""
        return next((event for event in self._before if event["event"] in names), None)

    def samples(self, step: int, ids: list[int]) -> None:
        self._append("samples.jsonl", {"step": step, "ids": ids})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self.writes:
            try:
                with (self._folder / name).open("ab", buffering=0) as handle:
                    left = memoryview((strict_dumps(record) + "\n").encode())
                    while left:  # one write, unless the disk is about to be full
                        left = left[handle.write(left) :]
            except OSError as error:
                raise UserError(
                    f"{self._folder / name}: cannot be written: {error.strerror}; make room or mend the folder, and "
                    "start again"
                ) from None


def drop_cut_line(path: Path) -> None:
    """Take away what follows the last line end: the next record would be glued to it."""
    if path.exists() and (whole := path.read_bytes().rfind(b"\n") + 1) < path.stat().st_size:
        os.truncate(path, whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; none where it is missing. A cut last line is left out. Raises UserError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; mend it or its permissions") from None
    return [parsed(line, path, number) for number, line in enumerate(lines, start=1)]


def parsed(line: str | bytes, path: Path, number: int) -> dict[str, Any]:
    """A record from its line, the one of that number in `path`. Raises UserError."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: is not JSON; mend or remove the line")
    return record
