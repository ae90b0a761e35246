"""`torchtitan-lite status RUN...`: how runs are doing, from their folders alone. No torch, and nothing is written."""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from torchtitan_lite.checkpoint.storage import MANIFEST, published_steps, step_folder
from torchtitan_lite.config.loading import user_path
from torchtitan_lite.errors import UserError
from torchtitan_lite.fields import TEXT, WHOLE, fields
from torchtitan_lite.observability.run_view import FAILURES, RunReader, RunView
from torchtitan_lite.observability.terminal import Screen
from torchtitan_lite.run_record import read_stopped
from torchtitan_lite.status_text import page
from torchtitan_lite.strict_json import strict_dumps

_EVERY_S = 1.0
# A run with no line for so long, and for so many times as long as usual, is not simply between two lines.
_PATIENCE_S, _PATIENCE_TIMES = 30.0, 10
_STARTING_S = 300.0  # comm.init_timeout_seconds, by default: by then a start has logged, or given up
_MARKS = ("config.json", "metrics.jsonl", "events.jsonl", ".lock")

_OF_CONFIG = {
    "world_size": WHOLE,
    "config.training.steps": WHOLE,
    "config.model.name": TEXT,
    "config.model.flavor": TEXT,
    "config.checkpoint.folder": TEXT,
}

State = Literal["starting", "running", "quiet", "finished", "stopped", "failed", "lost", "unreadable"]


@dataclass(frozen=True)
class Status:
    """How a run is doing; None for what is not known. Times in seconds, rates in tokens per second.

    told: why it is in that state. eta_s: of the steps that are left, without pauses. usual_s: between two lines.
    held: whether a process holds the folder; None where that is for another machine to say. curve: losses in the order
    of steps. changes: (step, ranks before, ranks now). skipped: the last step skipped, and how many were. troubles: the
    last ones, (age, text).
    """

    run: str
    state: State
    told: str
    model: str = ""
    mesh: str = ""
    step: int = 0
    steps: int | None = None
    eta_s: float | None = None
    step_time_s: float | None = None
    usual_s: float | None = None
    last_line_age_s: float | None = None
    held: bool | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    tps: float | None = None
    mfu: float | None = None
    memory_peak_gib: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    validation_step: int | None = None
    validation_loss: float | None = None
    attempts: int = 0
    ranks: int | None = None
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: int = 0
    skipped_last: str = ""
    troubles: list[tuple[float, str]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)


class Run:
    """One run folder, read again and again: only what is new of it."""

    def __init__(self, name: str) -> None:
        """Raises UserError where there is no folder, or one that is no run's."""
        self.name, self.folder = name, user_path(name, "RUN")
        if not self.folder.is_dir():
            kind = "is no folder" if self.folder.exists() else "no such folder"
            raise UserError(f"{name}: {kind}; name the run folder (job.dump_folder), as in outputs/llama3_debug")
        if not any((self.folder / mark).exists() for mark in _MARKS):
            inside = sorted(entry.parent.name for entry in self.folder.glob("*/config.json"))
            mend = f"; name one in it, as in {self.folder / inside[0]}" if inside else ""
            raise UserError(f"{name}: is no run folder, it has no {', '.join(_MARKS[:3])}{mend}")
        self._reader = RunReader(self.folder)
        self._config: tuple[int, dict[str, Any]] = (0, {})
        self._saved: tuple[tuple[int, int], int | None, float] = ((-1, -1), None, 0.0)

    def status(self) -> Status:
        view, record, now = self._reader.read(), self._read_config(), time.time()
        new, start, steps = view.newest, view.start or {}, record.get("config.training.steps")
        saved, saved_at = self._checkpoint(view, record.get("config.checkpoint.folder") or "checkpoint")
        ranks = start.get("world_size") or record.get("world_size")
        step_time = view.step_time_s()
        usual = step_time * view.between if step_time is not None else None
        held, at = _held(self.folder, start.get("host")), self._reader.changed_at
        age = max(0.0, now - at) if at is not None else None
        state, told = self._state(view, age, usual, held)
        lasts = state in ("running", "quiet")
        validation, tps = view.validation or {}, new.get("tps")
        return Status(
            run=self.name,
            state=state,
            told=told,
            model=" ".join(filter(None, (record.get("config.model.name"), record.get("config.model.flavor")))),
            mesh=start.get("mesh") or "",
            step=view.step,
            steps=steps,
            eta_s=(steps - view.step) * step_time if lasts and steps is not None and step_time is not None else None,
            step_time_s=step_time,
            usual_s=usual,
            last_line_age_s=age,
            held=held,
            loss=new.get("loss"),
            grad_norm=new.get("grad_norm"),
            lr=new.get("lr"),
            tokens_per_s=tps * ranks if tps is not None and ranks else None,
            tps=tps,
            mfu=new.get("mfu"),
            memory_peak_gib=new.get("memory_peak_gib"),
            checkpoint_step=saved,
            checkpoint_age_s=max(0.0, now - saved_at) if saved is not None else None,
            validation_step=validation.get("step"),
            validation_loss=validation.get("loss"),
            attempts=view.attempts,
            ranks=ranks,
            changes=view.sizes,
            skipped=len(view.skipped),
            skipped_last=f"step {view.skipped[-1]['step']}: {view.skipped[-1]['why'] or ''}" if view.skipped else "",
            troubles=[(max(0.0, now - when), text) for when, text in view.troubles[-3:]],
            curve=[loss for _, loss in view.curve],
        )

    def _read_config(self) -> dict[str, Any]:
        """By the names of _OF_CONFIG; {} where it is not there yet."""
        path = self.folder / "config.json"
        try:
            changed = path.stat().st_mtime_ns
            if changed == self._config[0]:
                return self._config[1]
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise UserError(f"{path}: is not a config.json of ours; this is no run folder, or a damaged one") from None
        self._config = (changed, fields(record, str(path), {}, _OF_CONFIG))
        return self._config[1]

    def _checkpoint(self, view: RunView, name: str) -> tuple[int | None, float]:
        """Step of the newest one and when it was written; looked for where lines say that there may be another."""
        if (known := (view.attempts, view.saves)) != self._saved[0]:
            folder, at = self.folder / name, 0.0
            steps = published_steps(folder)
            if steps:
                newest = step_folder(folder, steps[-1])
                try:
                    at = (newest / MANIFEST if (newest / MANIFEST).exists() else newest).stat().st_mtime
                except FileNotFoundError:  # superseded since it was listed; the next look finds another
                    return self._saved[1:]
            self._saved = (known, steps[-1] if steps else None, at)
        return self._saved[1:]

    def _state(self, view: RunView, age: float | None, usual: float | None, held: bool | None) -> tuple[State, str]:
        if view.ended is not None and view.ended["event"] == "end":
            return "finished", ""
        if (stopped := read_stopped(self.folder)) is not None:
            kept = "nothing saved" if stopped.get("saved") is None else f"step {stopped['saved']} is saved"
            return "stopped", f"by {stopped.get('signal')} at step {stopped.get('step')}, {kept}"
        if view.ended is not None and view.ended["event"] in FAILURES:
            return "failed", str(view.ended["event"])
        gone = "its process has gone" if held is False else ""
        if view.start is None:
            began = max((self.folder / mark).stat().st_mtime for mark in _MARKS if (self.folder / mark).exists())
            fresh = held or (time.time() - began < _STARTING_S)
            return ("starting", "nothing is logged yet") if fresh else ("lost", "it has never logged anything")
        if gone and (age or 0.0) > 1.0:  # one that ends lets go of the folder a moment after its last line
            return "lost", gone
        patience = max(_PATIENCE_S, _PATIENCE_TIMES * usual) if usual is not None else _STARTING_S
        if view.newest.get("attempt") != view.start.get("attempt"):  # a first step has much to do
            return ("starting", "no step is logged yet") if (age or 0.0) < max(patience, _STARTING_S) else ("quiet", "")
        return ("running", "") if (age or 0.0) < patience else ("quiet" if held else "lost", "")


class _Watched:
    """A run that may not be there. One of several must not hide the others, and may be read later."""

    def __init__(self, name: str, *, alone: bool) -> None:
        self._name, self._alone = name, alone
        self._run: Run | None = None
        self.error: UserError | None = None

    def status(self) -> Status:
        """Raises UserError where there is no other to be shown."""
        try:
            self._run, self.error = self._run or Run(self._name), None
            return self._run.status()
        except UserError as error:
            self.error = error
        except OSError as error:  # what is not ours to read, or gone since it was listed
            self.error = UserError(f"{self._name}: {error.strerror or error}; make it readable, or leave it out")
        if self._alone:
            raise self.error
        self._run = None  # its reader has passed over what it could not take
        return Status(self._name, "unreadable", str(self.error).removeprefix(f"{self._name}: "))


def run(names: Sequence[str], *, as_json: bool, once: bool, stream: TextIO | None = None) -> int:
    """Show runs, live ones until Ctrl-C or until there is nothing to wait for; return the exit code: 0, or 2 where one
    of several cannot be read, with a line of it on stderr. Raises UserError where the only one cannot."""
    stream = stream or sys.stdout
    runs = [_Watched(name, alone=len(names) == 1) for name in names]
    if as_json:
        told = [_document(each.status()) for each in runs]
        print(strict_dumps(told[0] if len(told) == 1 else told, indent=1), file=stream)
    elif once or not stream.isatty():
        width = shutil.get_terminal_size((80, 24)).columns
        for line, _ in page([each.status() for each in runs], width, plain=_is_plain(stream)):
            print(line, file=stream)
    else:
        _live(runs, stream)
    errors = [each.error for each in runs if each.error is not None]
    for error in errors:
        print(error.line(), file=sys.stderr)
    return 2 if errors else 0


def _live(runs: Sequence[_Watched], stream: TextIO) -> None:
    """Draw them again and again until there is nothing to wait for, or Ctrl-C."""
    screen = Screen(stream)
    try:
        while True:
            told = [each.status() for each in runs]
            columns, rows = shutil.get_terminal_size((80, 24))
            screen.draw(page(told, columns, plain=_is_plain(stream)), columns, rows)
            if all(status.state in ("finished", "unreadable") for status in told):
                return
            time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        return


def _is_plain(stream: TextIO) -> bool:
    return "utf" not in (stream.encoding or "").lower()


def _document(status: Status) -> dict[str, Any]:
    found = {key: value for key, value in asdict(status).items() if key != "curve"}
    if status.state != "unreadable":
        return found
    return {key: value if key in ("run", "state", "told") else None for key, value in found.items()}


def _held(folder: Path, host: str | None) -> bool | None:
    """Whether a process of this machine holds the folder's lock; None where `host`, which the run is on, is another or
    not known. The lock is only looked at: to try it could stop a start."""
    if host != os.uname().nodename:
        return None
    try:
        inode = f":{(folder / '.lock').stat().st_ino} "
        return any("FLOCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())
    except OSError:
        return None
