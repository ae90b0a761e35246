"""Write checkpoints, beside training where asked to: a copy of a rank's tensors, its file, the manifest, the rename."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.checkpoint import storage
from torchtitan_lite.checkpoint.shards import Part, write_parts
from torchtitan_lite.distributed.runtime import from_first_rank
from torchtitan_lite.errors import UserError

logger = logging.getLogger(__name__)

# Tensors beside those of the model and its optimizer, by how their names begin: in nobody's count of a whole.
BESIDE = ("rng.", "faults.")


@dataclass(frozen=True)
class Outcome:
    """How a save went, the same on every rank. error: why there is no checkpoint; None where there is.

    seconds: that it took. stalled: seconds of those in which training waited.
    """

    step: int
    folder: Path
    error: str | None
    seconds: float
    stalled: float


class Saver:
    """Saves of one run, one at a time.

    mode: checkpoint.async_mode. While one is written in the background, training goes on with tensors that change:
    it works on a copy, in memory that is kept for the next one: making that would take longer than the copy. group:
    all ranks, for nothing else, with time enough for the slowest disk.
    """

    def __init__(self, folder: Path, mode: str, keep_latest_k: int, group: dist.ProcessGroup) -> None:
        self._folder, self._mode, self._keep, self._group = folder, mode, keep_latest_k, group
        self._thread = None if mode == "disabled" else ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flying: Future[Outcome] | None = None
        self._staged: dict[str, Tensor] = {}

    def save(self, step: int, parts: Mapping[str, Part], contents: Mapping[str, Any], whole: int) -> None:
        """whole: numbers of all tensors of a stage on its first rank, else 0; what all ranks write adds up to it."""
        assert self._flying is None, "one save at a time"
        started = time.perf_counter()
        if self._thread is None:
            self._flying = Future()
            outcome = self._write(step, parts, contents, whole, started, None)
            self._flying.set_result(outcome)
            return
        staged = self._stage(parts)
        stalled = time.perf_counter() - started
        self._flying = self._thread.submit(self._write, step, staged, contents, whole, started, stalled)

    @property
    def in_flight(self) -> bool:
        return self._flying is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of the save in flight is done; others' may not be."""
        return self._flying is not None and self._flying.done()

    def outcome(self) -> Outcome:
        """Wait for the save in flight and say how it went."""
        assert self._flying is not None
        outcome, self._flying = self._flying.result(), None
        return outcome

    def close(self) -> None:
        """Wait for what is in flight, and for nothing else."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _stage(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        staged = {}
        pinned = self._mode == "async_with_pinned_mem" and torch.cuda.is_available()
        for name, part in parts.items():
            copy = self._staged.get(name)
            if copy is None or copy.shape != part.local.shape:
                copy = torch.empty(part.local.shape, dtype=part.local.dtype, device="cpu", pin_memory=pinned)
                self._staged[name] = copy
            copy.copy_(part.local, non_blocking=pinned)
            staged[name] = Part(copy, part.offset, part.shape)
        if pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(
        self,
        step: int,
        parts: Mapping[str, Part],
        contents: Mapping[str, Any],
        whole: int,
        started: float,
        stalled: float | None,
    ) -> Outcome:
        """On every rank: its file, what all wrote, and on the first rank the manifest and the name. Collective."""
        staging, final = storage.staging_folder(self._folder, step), storage.step_folder(self._folder, step)
        error = from_first_rank(_error_of(lambda: _make(staging)) if self._first else None, self._group)
        report: dict[str, Any] = {}
        if error is None:
            error = _error_of(lambda: report.update(_write_own(staging, parts, whole)))
            reports: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(reports, (error, report), group=self._group)
            error = next((error for error, _ in reports if error), None)
            if error is None:
                expected, found = (sum(report[key] for _, report in reports) for key in ("whole", "numbers"))
                assert expected == found, f"ranks wrote {found} numbers of {expected}"
            if error is None and self._first:
                error = _error_of(lambda: self._publish(staging, final, contents, [r for _, r in reports]))
            error = from_first_rank(error, self._group)
        if error is not None and self._first:
            shutil.rmtree(staging, ignore_errors=True)
        if error is None and self._first:
            self._prune()
        seconds = time.perf_counter() - started
        return Outcome(step, final, error, seconds, seconds if stalled is None else stalled)

    @property
    def _first(self) -> bool:
        return dist.get_rank() == 0

    def _publish(self, staging: Path, final: Path, contents: Mapping[str, Any], reports: list[dict[str, Any]]) -> None:
        files = {name: entry for report in reports for name, entry in report["files"].items()}
        for name, entry in files.items():
            if not (staging / name).is_file() or (staging / name).stat().st_size != entry["bytes"]:
                raise OSError(f"rank 0 does not see {staging / name}; the nodes must share the run folder")
        storage.publish(staging, final, {**contents, "files": files})

    def _prune(self) -> None:
        """Older checkpoints that cannot be removed are no failure of the one that is there."""
        try:
            storage.prune(self._folder, self._keep)
        except (OSError, UserError) as error:
            logger.warning("%s: older checkpoints could not be removed: %s", self._folder, error)


def _error_of(work: Callable[[], object]) -> str | None:
    """What keeps a save from being done, in words; None where nothing does.

    Whatever it is: an error raised here would leave the other ranks waiting for this one.
    """
    try:
        work()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    except Exception as error:
        logger.exception("a save failed")
        return f"{type(error).__name__}: {error}"
    return None


def _make(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)  # what a save that was killed left
    staging.mkdir(parents=True)


def _write_own(staging: Path, parts: Mapping[str, Part], whole: int) -> dict[str, Any]:
    if not parts:
        return {"whole": whole, "numbers": 0, "files": {}}
    name = storage.file_of(dist.get_rank())
    entry = write_parts(staging / name, parts)
    numbers = sum(part.local.numel() for name, part in parts.items() if not name.startswith(BESIDE))
    return {"whole": whole, "numbers": numbers, "files": {name: entry}}
