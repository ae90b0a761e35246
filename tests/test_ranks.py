"""The pool itself: results in order, failures and hangs that name the rank."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, RankPool


def _sum_of_ranks() -> tuple[int, float, int]:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), torch.get_num_threads()


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has its reasons")
    dist.barrier()


def _hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def _die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(3)


def test_results_come_in_the_order_of_ranks(pool: RankPool) -> None:
    assert pool.run(_sum_of_ranks, 2) == [(0, 3.0, 1), (1, 3.0, 1)]
    assert pool.run(_sum_of_ranks, 4) == [(rank, 10.0, 1) for rank in range(4)]


def test_a_failure_names_rank_and_test_and_the_pool_lives_on(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)_raise_on_rank_1: rank 1 of 2 failed:.*rank 1 has its reasons"):
        pool.run(_raise_on_rank_1, 2)
    assert len(pool.run(_sum_of_ranks, 2)) == 2


def test_a_hang_names_the_rank_and_where_it_is(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)_hang_on_rank_1: ranks \[1\] of 2 hang after 1 s.*test_ranks.py"):
        pool.run(_hang_on_rank_1, 2, timeout=1.0)
    assert len(pool.run(_sum_of_ranks, 2)) == 2


def test_a_death_names_the_rank(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 of 2 failed:\nthe process died with exit code 3"):
        pool.run(_die_on_rank_0, 2)
    assert len(pool.run(_sum_of_ranks, 2)) == 2


def _abort_after(served: Path) -> None:
    """Dies in a process that has served a run before."""
    seen = served / str(os.getpid())
    if seen.exists():
        os.abort()


def _note(served: Path) -> None:
    (served / str(os.getpid())).touch()


def test_a_broken_heap_is_told_and_the_run_repeated_once(tmp_path: Path) -> None:
    pool = RankPool(1)
    try:
        pool.run(_note, 1, tmp_path, group=False)
        with pytest.warns(UserWarning, match="repeated in new processes, once in a session: _abort_after: rank 0 of 1"):
            pool.run(_abort_after, 1, tmp_path, group=False)
        pool.run(_note, 1, tmp_path, group=False)
        with pytest.raises(RankError, match="exit code -6"):
            pool.run(_abort_after, 1, tmp_path, group=False)
        with pytest.raises(RankError, match="exit code -6"):  # a new process has no excuse
            pool.run(os.abort, 1, group=False)
    finally:
        pool.close()


def _redistributes(axis: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    rows = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    (rows @ rows).redistribute(mesh, [Shard(1)]).full_tensor()


def _gloo_threads() -> int:
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def test_a_run_leaves_no_threads_of_its_groups(pool: RankPool) -> None:
    counts = []
    for axis in ("dp", "tp", "cp"):  # what is cached is so by mesh
        pool.run(_redistributes, 2, axis)
        counts.append(pool.run(_gloo_threads, 2, group=False))
    assert counts[0] == counts[1] == counts[2]
