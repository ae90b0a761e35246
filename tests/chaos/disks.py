"""Disks that are full or read only while a run goes on. Needs the right to mount."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.chaos.kills import is_bad, wait_until
from tests.chaos.launched import launch
from tests.checkpoint.reading import events, last_lines
from tests.ranks import RankPool
from torchtitan_lite.checkpoint import storage


class CannotMount(Exception):
    """This user may not mount file systems here."""


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of `mib` MiB at `folder`. Raises CannotMount."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotMount("there is no mount command") from None
    if done.returncode != 0:
        raise CannotMount(done.stderr.strip())


def _remounted(how: str, disk: str) -> bool:
    """Whether it could be: it cannot while a file is being written."""
    try:
        _mount("-o", f"remount,{how}", disk)
    except CannotMount:
        return False
    return True


def full_checkpoint_disk(pool: RankPool, recipe: Path, folder: Path, undisturbed: Path) -> list[str]:
    """The disk of the checkpoints has room for a few of them, and later less: what is wrong with what the run does."""

    def fill() -> None:
        _fill(folder / "checkpoint" / "others")

    return _disturbed(pool, recipe, folder, undisturbed, fill, (folder / "checkpoint" / "others").unlink, "No space")


def read_only_checkpoints(pool: RankPool, recipe: Path, folder: Path, undisturbed: Path) -> list[str]:
    """The disk of the checkpoints turns read only for a while, as after an error."""
    disk = str(folder / "checkpoint")
    return _disturbed(
        pool,
        recipe,
        folder,
        undisturbed,
        lambda: wait_until(lambda: _remounted("ro", disk), 20),
        lambda: wait_until(lambda: _remounted("rw", disk), 20),
        "Read-only file system",
    )


def _disturbed(
    pool: RankPool, recipe: Path, folder: Path, undisturbed: Path, disturb: Any, mend: Any, expected: str
) -> list[str]:
    """Disturb the disk once there is a checkpoint, mend it when a save has failed; training goes on all the while."""
    from tests.test_trainer import _run

    def meanwhile() -> None:
        if wait_until(lambda: events(folder, "checkpoint"), 60):
            disturb()
            wait_until(lambda: events(folder, "checkpoint failed"), 60)
            mend()

    with small_disk(folder / "checkpoint", 14):
        other = threading.Thread(target=meanwhile)
        other.start()
        lines = _run(pool, 2, recipe, folder, "--checkpoint.async_mode=async")
        other.join()
        failed, saved = events(folder, "checkpoint failed"), events(folder, "checkpoint")
        faults = is_bad(folder)
        if not failed or not all(expected in event["error"] for event in failed):
            faults.append(f"saves that failed: {[event['error'] for event in failed]}, expected {expected}")
        if failed and saved[-1]["step"] <= failed[-1]["step"]:
            faults.append("no checkpoint after the disk was mended")
        if [line["loss"] for line in lines] != [line["loss"] for line in last_lines(undisturbed / "metrics.jsonl")]:
            faults.append("other losses than the undisturbed run")
    return faults


def full_run_disk(recipe: Path, folder: Path) -> list[str]:
    """The disk of the whole run folder fills up: the run ends with a line that says so, its checkpoints are good."""
    with small_disk(folder, 14):
        process = launch(recipe, folder)
        if not wait_until(lambda: events(folder, "checkpoint"), 90):
            process.kill()
            return ["no checkpoint within 90 s"]
        _fill(folder / "others")
        code, faults = process.wait(90), is_bad(folder)
        told = folder.with_name(f"{folder.name}.log").read_text()
        if code == 0 or "No space left on device; make room or mend the folder, and start again" not in told:
            faults.append(f"ended with {code}: {told[-2000:]}")
        if not storage.published_steps(folder / "checkpoint"):
            faults.append("no checkpoint is left")
    return faults


def _fill(path: Path) -> None:
    """Write to `path` until its disk is full."""
    with path.open("wb", buffering=0) as handle, suppress(OSError):
        while handle.write(bytes(1 << 12)):
            pass
