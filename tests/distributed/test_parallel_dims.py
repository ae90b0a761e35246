"""Degrees fill the world size exactly, or say which would."""

from collections.abc import Iterator
from itertools import product

import pytest

from torchtitan_lite.config.schema import Parallelism
from torchtitan_lite.distributed.parallel_dims import AXES, ParallelDims
from torchtitan_lite.errors import UserError


@pytest.mark.parametrize(
    ("section", "world_size", "dp_shard"),
    [
        (Parallelism(), 1, 1),
        (Parallelism(), 6, 6),
        (Parallelism(data_parallel_replicate_degree=2), 8, 4),
        (Parallelism(data_parallel_replicate_degree=2, tensor_parallel_degree=2), 8, 2),
        (Parallelism(context_parallel_degree=2, pipeline_parallel_degree=2, tensor_parallel_degree=2), 8, 1),
        (Parallelism(data_parallel_shard_degree=3, tensor_parallel_degree=2), 6, 3),
    ],
)
def test_the_shard_degree_takes_what_the_others_leave(section: Parallelism, world_size: int, dp_shard: int) -> None:
    dims = ParallelDims.from_config(section, world_size)
    assert dims.dp_shard == dp_shard
    assert dims.world_size == world_size
    assert dims.dp_replicate == section.data_parallel_replicate_degree
    assert (dims.pp, dims.cp, dims.tp, dims.ep) == (
        section.pipeline_parallel_degree,
        section.context_parallel_degree,
        section.tensor_parallel_degree,
        section.expert_parallel_degree,
    )


@pytest.mark.parametrize(
    ("section", "world_size", "message"),
    [
        (
            Parallelism(data_parallel_replicate_degree=3),
            4,
            "4 ranks cannot be shared out: pp 1 x dp_replicate 3 x cp 1 x tp 1 = 3 does not divide it; "
            "use a multiple of 3 ranks or lower a degree",
        ),
        (
            Parallelism(data_parallel_replicate_degree=2, tensor_parallel_degree=2),
            2,
            "2 ranks cannot be shared out: pp 1 x dp_replicate 2 x cp 1 x tp 2 = 4 does not divide it; "
            "use a multiple of 4 ranks or lower a degree",
        ),
        (
            Parallelism(data_parallel_shard_degree=2),
            4,
            "parallelism asks for pp 1 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 1 = 2 ranks, there are 4; use 2 ranks "
            "or set parallelism.data_parallel_shard_degree = -1 to take what is left",
        ),
        (
            Parallelism(data_parallel_replicate_degree=2, data_parallel_shard_degree=4),
            4,
            "parallelism asks for pp 1 x dp_replicate 2 x dp_shard 4 x cp 1 x tp 1 = 8 ranks, there are 4; use 8 ranks "
            "or set parallelism.data_parallel_shard_degree = -1 to take what is left",
        ),
    ],
)
def test_degrees_that_do_not_fit_say_which_would(section: Parallelism, world_size: int, message: str) -> None:
    with pytest.raises(UserError) as raised:
        ParallelDims.from_config(section, world_size)
    assert str(raised.value) == message


@pytest.mark.parametrize("degree", [1, 2, 12])
def test_experts_share_the_ranks_of_the_other_axes(degree: int) -> None:
    assert ParallelDims(dp_replicate=5, dp_shard=6, cp=2, ep=degree).world_size == 60


@pytest.mark.parametrize("axis", [*AXES])
def test_a_degree_is_at_least_one(axis: str) -> None:
    with pytest.raises(UserError, match=f"degree of {axis} is 0: must be at least 1"):
        ParallelDims(**{"dp_replicate": 1, "dp_shard": 1, axis: 0})


def test_axes_run_from_the_slowest_links_to_the_fastest() -> None:
    dims = ParallelDims(dp_replicate=2, dp_shard=3, cp=5, tp=7, pp=11)
    assert list(dims.degrees.items()) == [("pp", 11), ("dp_replicate", 2), ("dp_shard", 3), ("cp", 5), ("tp", 7)]
    assert dims.world_size == 2 * 3 * 5 * 7 * 11
    assert dims.batch_ranks == 6


def test_ranks_that_differ_in_shard_or_copy_read_different_samples_and_no_others() -> None:
    dims = ParallelDims(dp_replicate=2, dp_shard=3, cp=2, tp=2, pp=2)
    coordinates = product(*(range(degree) for degree in dims.degrees.values()))
    for rank, (_, replicate, shard, _, _) in enumerate(coordinates):
        assert dims.batch_rank(rank) == replicate * 3 + shard


@pytest.fixture
def sixteen_ranks() -> Iterator[None]:
    """A process group of 16 that moves nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_shard": 16},
        {"dp_replicate": 4, "dp_shard": 4},
        {"dp_replicate": 2, "dp_shard": 2, "tp": 4},
        {"dp_shard": 4, "cp": 2, "tp": 2},
        {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "tp": 2},
        {"pp": 2, "dp_shard": 2, "cp": 2, "tp": 2},
        {"pp": 2, "dp_replicate": 2, "cp": 2, "tp": 2},
        {"pp": 4, "cp": 4},
    ],
    ids=str,
)
def test_a_rank_stands_where_the_device_mesh_has_it(sixteen_ranks: None, degrees: dict[str, int]) -> None:
    from torchtitan_lite.distributed.mesh import build_mesh

    dims = ParallelDims(**{"dp_replicate": 1, "dp_shard": 1, **degrees})
    mesh = build_mesh(dims, "cpu")
    longer = {axis for axis, degree in dims.degrees.items() if degree > 1}
    assert mesh.mesh_dim_names == tuple(axis for axis in AXES if axis in longer | {"dp_shard"})
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank in range(16):
        at = dims.coordinate(rank)
        assert list(at) == list(reversed(AXES))
        ((*expected,),) = (mesh.mesh == rank).nonzero().tolist()
        assert [at[axis] for axis in mesh.mesh_dim_names or ()] == expected
        assert all(at[axis] == 0 for axis, degree in dims.degrees.items() if degree == 1)
        readers.setdefault(dims.batch_rank(rank), set()).add((at["dp_replicate"], at["dp_shard"]))
    # A batch rank is a place on the data axes, and every such place one.
    assert sorted(readers) == list(range(dims.batch_ranks))
    assert [sorted(places) for _, places in sorted(readers.items())] == [
        [place] for place in product(range(dims.dp_replicate), range(dims.dp_shard))
    ]


def test_without_other_axes_a_rank_is_its_own_batch_rank() -> None:
    dims = ParallelDims(dp_replicate=2, dp_shard=4)
    assert [dims.batch_rank(rank) for rank in range(8)] == list(range(8))


def test_dims_name_the_degrees_above_one() -> None:
    assert str(ParallelDims(1, 1)) == "1 rank"
    assert str(ParallelDims(2, 4)) == "8 ranks: dp_replicate 2 x dp_shard 4"
    assert str(ParallelDims(1, 4, tp=2, pp=3)) == "24 ranks: pp 3 x dp_shard 4 x tp 2"
    assert str(ParallelDims(1, 4, ep=2)) == "4 ranks: dp_shard 4, ep 2 within"
