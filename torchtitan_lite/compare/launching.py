"""Running recipes in turns, as `torchtitan-lite train` does; finished runs stay, and are not run again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_lite.compare.checked import MARK, read_mark
from torchtitan_lite.compare.runs import read_run
from torchtitan_lite.compare.sides import Side, key_of, overrides_of
from torchtitan_lite.errors import UserError
from torchtitan_lite.files import replace
from torchtitan_lite.preflight import run_folder_held
from torchtitan_lite.strict_json import strict_dumps

_LOGGED = re.compile(r" step +(\d+)/\d+  loss ")
_LAST_LINES = 5
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Called with the side, the number of the repeat, and the step that it has reached.
Watch = Callable[[Side, int, int], None]


class Interrupted(Exception):
    """The user stopped the comparison; what is finished stays."""


@dataclass
class _Stop:
    """asked: whether a signal has come. process: the run under way."""

    asked: bool = False
    process: "subprocess.Popen[str] | None" = None


def run_all(sides: Sequence[Side], out: Path, repeats: int, ranks: int, watch: Watch) -> None:
    """Give each side with a recipe its runs, one a repeat, in turns; each turn goes the other way round than the one
    before, so that what drifts in a machine is in nobody's favour. Raises Interrupted, with what has run in `sides`."""
    running = [side for side in sides if side.plan is not None]
    folders = _folders(running, out / "runs")
    with _signals_held() as stop:
        for repeat in range(repeats):
            for side in running if repeat % 2 == 0 else running[::-1]:
                if side.lost:  # what fails once fails again
                    continue
                _run(side, folders[side.name] / f"repeat-{repeat}", repeat, ranks, watch, stop)


def planned(sides: Sequence[Side], repeats: int) -> int:
    """Steps of all runs together."""
    return sum(repeats * side.plan.config.training.steps for side in sides if side.plan is not None)


def _folders(sides: Sequence[Side], above: Path) -> dict[str, Path]:
    """By side, where its repeats go. One recipe named twice is two sides with runs of their own, else it would be
    compared with itself. Places do not count: the runs of a recipe stay its own where another is named before it."""
    found: dict[str, Path] = {}
    for side in sides:
        assert side.plan is not None
        first = above / f"{_plain(side.label)}-{key_of(side.plan, 0, {})[:8]}"
        names = (first, *(first.with_name(f"{first.name}-{number}") for number in range(2, len(sides) + 1)))
        found[side.name] = next(each for each in names if each not in found.values())
    return found


def _run(side: Side, folder: Path, repeat: int, ranks: int, watch: Watch, stop: _Stop) -> None:
    """One run, its seed the recipe's and the number of the repeat."""
    assert side.plan is not None
    seed = side.plan.config.debug.seed + repeat
    key, last = key_of(side.plan, seed, side.identity), side.plan.config.training.steps
    mark = read_mark(folder)
    if mark is None or mark.get("key") != key or mark.get("state") != "finished":
        if stop.asked:
            raise Interrupted
        _make_room(folder, mark)
        mark = {"key": key, "state": "begun", "started": time.time()}
        replace(folder / MARK, strict_dumps(mark))
        overrides = [*overrides_of(side), f"--debug.seed={seed}", f"--job.dump_folder={folder}"]
        code, first_step_s, lines = _launched(
            side, overrides, folder, ranks, lambda step: watch(side, repeat, step), stop
        )
        if stop.asked:
            raise Interrupted
        if code:
            why = next((line for line in reversed(lines) if line.startswith("error: ")), f"exit code {code}")
            side.lost.append((folder, f"{why.removeprefix('error: ')}; its log: {_log(folder)}"))
            return
        replace(folder / MARK, strict_dumps({**mark, "state": "finished", "first_step_s": first_step_s}))
    watch(side, repeat, last)
    try:
        side.runs.append(read_run(folder))
    except UserError as error:
        side.lost.append((folder, str(error)))


def _make_room(folder: Path, mark: dict[str, Any] | None) -> None:
    """Raises UserError for a folder that no comparison has made."""
    if folder.exists() and mark is None and any(folder.iterdir()):
        raise UserError(f"{folder}: is in the way, and not a comparison's; move it away, or choose another --out")
    try:
        if folder.exists():
            with run_folder_held(folder):
                shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another --out") from None


def _launched(
    side: Side, overrides: list[str], folder: Path, ranks: int, at_step: Callable[[int], None], stop: _Stop
) -> tuple[int, float | None, list[str]]:
    """Run to the end: (exit code, seconds to the first logged step, the last lines). The log goes beside the folder."""
    environment: dict[str, str] = {**os.environ, "NPROC": str(ranks), "NNODES": "1", "LOG_RANK": "0"}
    command = [sys.executable, "-m", "torchtitan_lite.launch", side.source.text, *overrides]
    started, first, lines = time.perf_counter(), None, deque[str](maxlen=_LAST_LINES)
    with (
        _log(folder).open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C would reach it beside the one that is passed on
        ) as process,
    ):
        assert process.stdout is not None
        stop.process = process
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip("\n"))
            if found := _LOGGED.search(line):
                first = first or time.perf_counter() - started
                at_step(int(found[1]))
    stop.process = None
    return process.returncode, first, list(lines)


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _plain(label: str) -> str:
    """For a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", label)


@contextmanager
def _signals_held() -> Iterator[_Stop]:
    """Signals that ask to stop are taken note of, and passed on to the run that is under way."""
    stop = _Stop()

    def take(number: int, _: Any) -> None:
        stop.asked = True
        if stop.process is not None:
            stop.process.send_signal(number)

    before = {each: signal.signal(each, take) for each in _STOPS if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
