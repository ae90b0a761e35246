"""The process among others: time-outs that are tightened, ranks that disagree."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool
from torchtitan_lite.config.schema import Comm, Debug
from torchtitan_lite.distributed import runtime
from torchtitan_lite.distributed.mesh import build_mesh
from torchtitan_lite.distributed.parallel_dims import ParallelDims
from torchtitan_lite.errors import UserError


def _wait_for_a_late_rank() -> list[float]:
    """Seconds that a collective waits: on the world, on an axis of the mesh, and on a patient group; rank 3 is late."""
    runtime.start(Comm(init_timeout_seconds=60), Debug())
    mesh = build_mesh(ParallelDims(dp_replicate=2, dp_shard=2), "cpu")
    patient = dist.new_group(timeout=timedelta(seconds=60))
    dist.barrier()
    runtime.tighten_timeouts(2, (patient, None))
    waits = []
    for group in (dist.group.WORLD, mesh.get_group("dp_shard")):
        started = time.monotonic()
        if dist.get_rank() == 2:  # shares both groups with rank 3
            with pytest.raises(RuntimeError, match=r"(?i)time"):
                dist.all_reduce(torch.zeros(1), group=group)
        waits.append(time.monotonic() - started)
    if dist.get_rank() == 3:
        time.sleep(6)
    started = time.monotonic()
    dist.barrier(patient)
    return [*waits, time.monotonic() - started]


def test_tightened_timeouts_hold_on_every_group_but_the_patient_one(pool: RankPool) -> None:
    ranks = pool.run(_wait_for_a_late_rank, 4, group=False)
    assert all(1.5 < wait < 5 for wait in ranks[2][:2]), ranks[2]
    assert ranks[0][2] > 5, "rank 3 was waited for"


def _disagree(seeds: list[int]) -> str:
    try:
        runtime.require_equal_on_all_ranks({"training.steps": 5, "debug.seed": seeds[dist.get_rank()]})
    except UserError as error:
        return str(error)
    return "equal"


def test_ranks_that_disagree_are_named(pool: RankPool) -> None:
    assert pool.run(_disagree, 2, [1, 1]) == ["equal", "equal"]
    messages = pool.run(_disagree, 3, [1, 1, 7])
    assert messages == ["debug.seed differs between ranks: rank 0 has 1, rank 2 has 7"] * 3


def _start_alone() -> tuple[int, int, int]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    here = runtime.start(Comm(), Debug())
    total = torch.ones(1)
    dist.all_reduce(total)
    return here.rank, here.world_size, int(total)


def test_one_process_needs_no_torchrun(pool: RankPool) -> None:
    assert pool.run(_start_alone, 1, group=False) == [(0, 1, 1)]


_TORCHS_ORDER = [1, 2, 0, 3, 4]


@pytest.mark.parametrize(
    ("capability", "cudnn", "seq_len", "cp", "first"),
    [
        ((9, 0), 91002, 8192, 1, True),
        ((10, 0), 91002, 8192, 4, True),
        ((9, 0), 91002, 8190, 1, False),  # where the older cuDNN is wrong
        ((9, 0), 91002, 1024, 8, False),
        ((9, 0), 91501, 8190, 1, True),
        ((9, 0), None, 8192, 1, False),
        ((8, 0), 91501, 8192, 1, False),
    ],
)
def test_attention_tries_cudnn_first_where_it_is_the_fastest_and_right(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int | None,
    seq_len: int,
    cp: int,
    first: bool,
) -> None:
    order = [list(_TORCHS_ORDER)]
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch._C, "_get_sdp_priority_order", lambda: order[-1])
    monkeypatch.setattr(torch._C, "_set_sdp_priority_order", order.append)
    runtime.prefer_cudnn_attention(torch.device("cpu"), seq_len, cp)
    assert order == [_TORCHS_ORDER]
    runtime.prefer_cudnn_attention(torch.device("cuda"), seq_len, cp)
    assert order[-1] == ([3, 1, 2, 0, 4] if first else _TORCHS_ORDER)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    order[1:] = []
    runtime.prefer_cudnn_attention(torch.device("cuda"), seq_len, cp)
    assert order == [_TORCHS_ORDER]


def _axes() -> dict[str, int]:
    mesh = build_mesh(ParallelDims(dp_replicate=2, dp_shard=2), "cpu")
    assert mesh.mesh_dim_names is not None
    return {name: mesh[name].get_local_rank() for name in mesh.mesh_dim_names}


def test_neighbouring_ranks_share_a_shard_group(pool: RankPool) -> None:
    assert pool.run(_axes, 4) == [{"dp_replicate": rank // 2, "dp_shard": rank % 2} for rank in range(4)]


def _start_twice() -> float:
    """The sum over ranks in the second start on one store, which the last rank comes late to."""
    runtime.start(Comm(init_timeout_seconds=60), Debug())
    dist.barrier()
    runtime.stop()
    time.sleep(int(os.environ["RANK"]))
    runtime.start(Comm(init_timeout_seconds=60), Debug())
    total = torch.ones(())
    dist.all_reduce(total)
    return total.item()


def test_a_second_start_does_not_take_the_first_ones_addresses(pool: RankPool) -> None:
    assert pool.run(_start_twice, 3, group=False) == [3.0, 3.0, 3.0]


def _restarted(counts: list[str]) -> bool:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = counts[dist.get_rank()]
    try:
        return runtime.is_restart()
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def test_ranks_agree_on_a_restart_whatever_their_agents_have_counted(pool: RankPool) -> None:
    assert pool.run(_restarted, 2, ["0", "1"]) == [True, True]
    assert pool.run(_restarted, 2, ["0", "0"]) == [False, False]
