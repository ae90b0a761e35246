"""Memory that runs out: what is said, what is written; the allocator is not CUDA's but a fake of it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan_lite.config.schema import ActivationCheckpoint, JobConfig, Optimizer, Parallelism, Profiling, Training
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.errors import UserError
from torchtitan_lite.profiling.memory import memory_watched, write_snapshot

GPU = Runtime(1, 2, torch.device("cuda", 0), "NVIDIA H100 80GB HBM3")
CPU = Runtime(0, 1, torch.device("cpu"), "CPU")
_TOLD = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the allocator's history."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 70 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 78 << 30)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **keys: asked.append(keys))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"held"))
    return asked


def _run_out(config: JobConfig, folder: Path, here: Runtime, error: Exception) -> str:
    with (
        pytest.raises(UserError) as raised,
        memory_watched(config, folder, here, lambda: ("forward and backward", 7)),
    ):
        raise error
    return str(raised.value)


def test_it_names_the_peak_and_what_to_change(tmp_path: Path, history: list[Any]) -> None:
    assert _run_out(JobConfig(), tmp_path, GPU, torch.OutOfMemoryError(_TOLD)) == (
        "rank 1 ran out of memory at step 7, forward and backward: at its peak it held 70.00 GiB of 78.00 "
        "reserved, of 80.00 there are, and 2.50 GiB more were asked for; lower training.local_batch_size = 8, set "
        'activation_checkpoint.mode = "full" (it is "selective"), raise training.loss_chunks = 1, or shard over more '
        "ranks"
    )
    assert history == [], "no history is kept where none is asked for"
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_already_is_not_proposed(tmp_path: Path, history: list[Any]) -> None:
    config = JobConfig(
        training=Training(local_batch_size=1, loss_chunks=4, enable_cpu_offload=True),
        activation_checkpoint=ActivationCheckpoint(mode="full"),
        optimizer=Optimizer(state_dtype="int8"),
    )
    assert _run_out(config, tmp_path, GPU, torch.OutOfMemoryError(_TOLD)).endswith("asked for; shard over more ranks")
    staged = replace(config, parallelism=Parallelism(pipeline_parallel_degree=2, pipeline_parallel_microbatch_size=4))
    told = _run_out(staged, tmp_path, GPU, torch.OutOfMemoryError(_TOLD))
    assert "; lower parallelism.pipeline_parallel_microbatch_size = 4, or shard" in told


def test_it_leaves_a_snapshot_where_history_is_kept(tmp_path: Path, history: list[Any]) -> None:
    config = JobConfig(profiling=Profiling(enable_memory_snapshot=True))
    told = _run_out(config, tmp_path, GPU, torch.OutOfMemoryError(_TOLD))
    path = tmp_path / "memory_snapshot" / "iteration_7_exit" / "rank1_memory_snapshot.pickle"
    assert told.endswith(f"; what it held is in {path}")
    assert path.read_bytes() == b"held"
    assert history == [{"max_entries": 100_000}, {"enabled": None}]


def test_a_host_that_has_no_more_says_so_too(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    told = _run_out(JobConfig(), tmp_path, CPU, error)
    where = "rank 0 ran out of memory at step 7, forward and backward: at its peak the process held "
    assert re.match(where + r"[\d.]+ GiB, and 9 bytes more were asked for; lower training", told)
    assert "cpu_offload" not in told


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_watched(JobConfig(), tmp_path, CPU, lambda: ("", 0)):
        raise RuntimeError("shapes do not fit")


def test_a_snapshot_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, history: list[Any]) -> None:
    (tmp_path / "taken").write_text("")
    assert write_snapshot(tmp_path / "taken", "10", 0) is None
