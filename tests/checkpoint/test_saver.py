"""Saves one after the other: memory, order, what a failed one leaves."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.reading import contents, whole_tensors
from tests.ranks import RankPool
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.checkpoint.saver import Saver
from torchtitan_lite.checkpoint.shards import Part


def _parts(numbers: int, value: float) -> dict[str, Part]:
    """This rank's share of a tensor that has `numbers` on each rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return {"model.w": Part(torch.full((numbers,), value), (numbers * rank,), (numbers * ranks,))}


def _save(saver: Saver, step: int, parts: dict[str, Part]) -> Any:
    whole = sum(part.shape[0] for part in parts.values()) if dist.get_rank() == 0 else 0
    saver.save(step, parts, contents(step, identity={}), whole)
    return saver.outcome()


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _memory_over_saves(folder: str, mode: str, saves: int) -> list[float]:
    saver = Saver(Path(folder), mode, 2, dist.group.WORLD)  # type: ignore[arg-type]
    resident = []
    for step in range(1, saves + 1):
        assert _save(saver, step, _parts(1 << 18, float(step))).error is None
        if step % 20 == 0:
            gc.collect()
            resident.append(_resident_mib())
    saver.close()
    return resident


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_memory_stays_flat_over_200_saves(pool: RankPool, tmp_path: Path, mode: str) -> None:
    """Each save is of 1 MiB a rank: were they kept, they would be 200 MiB at the end."""
    for resident in pool.run(_memory_over_saves, 2, str(tmp_path), mode, 200):
        assert resident[-1] - resident[0] < 8, resident
    assert storage.published_steps(tmp_path) == [199, 200]
    assert torch.equal(whole_tensors(tmp_path / "step-00000200")["model.w"], torch.full((1 << 19,), 200.0))


def _save_while_training_goes_on(folder: str, mode: str) -> None:
    saver = Saver(Path(folder), mode, 0, dist.group.WORLD)  # type: ignore[arg-type]
    parts = _parts(1 << 20, 1.0)
    saver.save(1, parts, contents(1), (2 << 20) if dist.get_rank() == 0 else 0)
    parts["model.w"].local.fill_(2.0)
    assert saver.in_flight
    assert saver.outcome().error is None
    assert not saver.in_flight
    saver.close()


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_background_save_holds_what_was_there_when_it_began(pool: RankPool, tmp_path: Path, mode: str) -> None:
    pool.run(_save_while_training_goes_on, 2, str(tmp_path), mode)
    assert torch.equal(whole_tensors(tmp_path / "step-00000001")["model.w"], torch.ones(2 << 20))


def _save_where_a_file_is(folder: str) -> list[str | None]:
    saver = Saver(Path(folder), "disabled", 0, dist.group.WORLD)  # type: ignore[arg-type]
    return [_save(saver, step, _parts(4, 1.0)).error for step in (1, 2)]


def test_a_folder_that_cannot_be_written_to_is_an_error_of_the_save(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("a file")
    for errors in pool.run(_save_where_a_file_is, 2, str(tmp_path / "checkpoint")):
        assert all(error and "Not a directory" in error for error in errors), errors


def _save_on_a_full_disk(folder: str) -> list[str | None]:
    saver = Saver(Path(folder), "async", 1, dist.group.WORLD)  # type: ignore[arg-type]
    sizes = (1 << 16, 1 << 22, 1 << 16)
    return [_save(saver, step, _parts(size, float(step))).error for step, size in enumerate(sizes, start=1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_one_save_and_leaves_room_for_the_next(pool: RankPool, small_disk: Path) -> None:
    for errors in pool.run(_save_on_a_full_disk, 2, str(small_disk)):
        assert errors[0] is None
        assert errors[1] is not None
        assert "No space left on device" in errors[1]
        assert errors[2] is None
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-00000003"]
    assert storage.verified(small_disk / "step-00000003") == []


def _save_less_than_all(folder: str) -> str:
    saver = Saver(Path(folder), "disabled", 0, dist.group.WORLD)  # type: ignore[arg-type]
    parts = _parts(4, 1.0)
    try:
        saver.save(1, {} if dist.get_rank() == 1 else parts, contents(1), 8 if dist.get_rank() == 0 else 0)
    except AssertionError as error:
        return str(error)
    return "saved" if saver.outcome().error is None else "error"


def test_a_save_that_misses_a_part_is_no_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(_save_less_than_all, 2, str(tmp_path)) == ["ranks wrote 4 numbers of 8"] * 2
    assert storage.published_steps(tmp_path) == []


def _save_where_none_can_be_removed(folder: str) -> list[str | None]:
    from unittest.mock import patch

    saver = Saver(Path(folder), "disabled", 1, dist.group.WORLD)  # type: ignore[arg-type]
    with patch.object(storage, "prune", side_effect=PermissionError(1, "Operation not permitted")):
        return [_save(saver, step, _parts(4, 1.0)).error for step in (1, 2)]


def test_what_cannot_be_removed_does_not_fail_the_save(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(_save_where_none_can_be_removed, 2, str(tmp_path)) == [[None, None]] * 2
    assert storage.published_steps(tmp_path) == [1, 2]
