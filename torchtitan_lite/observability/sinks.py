"""Where a run's records go: metrics.jsonl, events.jsonl, samples.jsonl, TensorBoard. One process writes."""

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.strict_json import strict_dumps

LINE_FILES = ("metrics.jsonl", "events.jsonl", "samples.jsonl")


class RunLog:
    """The run folder's JSON lines; a line is one write and one flush, so that a killed run leaves whole lines.

    writes: whether this process is the one that does. attempt: starts of this run so far, this one included.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder, self.writes = folder, writes
        if writes:
            for name in LINE_FILES:
                drop_cut_line(folder / name)
        events = read_lines(folder / "events.jsonl")
        self.attempt = 1 + sum(event["event"] == "start" for event in events)
        self._before = [event for event in events if event.get("attempt") == self.attempt - 1]

    def metrics(self, record: dict[str, Any]) -> None:
        self._append("metrics.jsonl", {**record, "attempt": self.attempt})

    def event(self, event: str, step: int, **details: Any) -> None:
        self._append(
            "events.jsonl", {"event": event, "time": time.time(), "step": step, "attempt": self.attempt, **details}
        )

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
    """The whole lines of a JSON lines file; none where it is missing. A cut last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
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


class TensorBoard:
    """Scalars to TensorBoard, written by a thread of its own: importing its writer would delay the second step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._writer: Future[Any] = self._thread.submit(_open_writer, folder, first_step)
        self._last: Future[None] | None = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._last is not None and self._last.done():
            self._last.result()  # a write that failed is raised here, one step late
        self._last = self._thread.submit(self._write, step, time.time(), scalars)

    def close(self) -> None:
        self._thread.submit(lambda: self._writer.result().close())
        self._thread.shutdown(wait=True)
        if self._last is not None:
            self._last.result()

    def _write(self, step: int, at: float, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.result().add_event(Event(wall_time=at, step=step, summary=Summary(value=values)))


def _open_writer(folder: Path, first_step: int) -> Any:
    """A writer whose readers drop what an earlier attempt logged at `first_step` or later."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), flush_secs=10)
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))
    return writer
