"""Kills under torchrun: a worker, all of them, or the agent, at any moment between start-up and end."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.kills import Tally, compared, is_bad, wait_until
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.observability.sinks import read_lines

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 180
VICTIMS = ("a worker", "all workers", "the agent")


def launch(
    recipe: Path,
    folder: Path,
    *overrides: str,
    log: Path | None = None,
    around: Sequence[str] = (),
    **variables: str,
) -> "subprocess.Popen[bytes]":
    """run_train.sh on two ranks, in a process group of its own, its output in a log beside the run folder.

    around: a command that runs it.
    """
    keep = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "LOG_RANK", "RANK")}
    environment = {**keep, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "2", **variables}
    command = [*around, str(ROOT / "run_train.sh"), str(recipe), f"--job.dump_folder={folder}", *overrides]
    with (log or folder.with_name(f"{folder.name}.log")).open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks below a launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or b"torchtitan_lite.train" not in (entry / "cmdline").read_bytes():
                continue
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue  # it has ended since
        if parent == launcher:
            found.append(int(entry.name))
    return sorted(found)


def _is_rank(process: int) -> bool:
    try:
        return b"torchtitan_lite.train" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False  # it has ended


def _kill(victim: str, launcher: int, choose: random.Random) -> None:
    workers = workers_of(launcher)
    doomed = {"a worker": workers and [choose.choice(workers)], "all workers": workers, "the agent": [launcher]}[victim]
    for process in doomed:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended by itself a moment before


def campaign(kills: int, recipe: Path, folder: Path, undisturbed: Path, seed: int, *overrides: str) -> Tally:
    """Launch again and again, killing each time; then let it finish and compare it with an undisturbed run."""
    choose, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        victim = VICTIMS[tally.kills % len(VICTIMS)]
        before = storage.published_steps(folder / "checkpoint")
        process = launch(recipe, folder, *overrides, MAX_RESTARTS="0")
        if wait_until(lambda: len(workers_of(process.pid)) == 2 or process.poll() is not None, 60):  # noqa: B023
            time.sleep(choose.uniform(0.0, 9.0))
        workers = workers_of(process.pid)
        if process.poll() is None:
            _kill(victim, process.pid, choose)
            tally.kills += 1
        process.wait(_TIMEOUT_S)
        # Ranks whose agent is gone are told to leave, and may be saving.
        wait_until(lambda: not any(map(_is_rank, workers)), 30)  # noqa: B023
        tally.resumed += _resumed_from(folder, before)
        tally.faults += [f"{victim}: {line}" for line in is_bad(folder)]
        if process.returncode == 0 and tally.kills < kills:
            return compared(tally, folder, undisturbed)  # done before all kills had come
    process = launch(recipe, folder, *overrides)
    if process.wait(_TIMEOUT_S) != 0:
        tally.faults.append(f"the last start ended with {process.returncode}")
    return compared(tally, folder, undisturbed)


def _resumed_from(folder: Path, steps: list[int]) -> bool:
    resumes = [line["step"] for line in read_lines(folder / "events.jsonl") if line["event"] == "resume"]
    return bool(steps and resumes) and resumes[-1] == steps[-1]
