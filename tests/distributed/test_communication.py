"""What a step communicates, counted: reductions in the last micro-batch, logits that stay where they are."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import RankPool
from tests.tiny import DEEP_LLAMA, write_recipe
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed import data_parallel, gloo

BLOCKS = DEEP_LLAMA.flavors["untied"].n_layers
UNITS = BLOCKS + 2  # embedding; norm and output
VOCABULARY = DEEP_LLAMA.flavors["untied"].vocab_size
_NAMES = {
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor"),
    "all_gather": ("_allgather_base_", "all_gather_into_tensor"),
    "all_reduce": ("allreduce_", "all_reduce"),
    "all_to_all": ("alltoall_base_",),  # how FSDP's reductions go over gloo
}


class Collectives(TorchDispatchMode):
    """Counts collectives by kind, and keeps the shapes that went in; bookkeeping, a number or two, is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            kind = next((kind for kind, names in _NAMES.items() if name in names), None)
            # c10d's in-place operations take the output first.
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            if kind and max(tensor.numel() for tensor in tensors) > 2:
                self.counts[kind] += 1
                self.shapes += [(kind, tuple(tensor.shape)) for tensor in tensors]
        return func(*args, **(kwargs or {}))


def _counted(
    recipe: str, arguments: list[str], microbatches: int, together: int = 0
) -> tuple[dict[str, int], list[Any]]:
    """Collectives of a second step's forward and backward on this rank. together: bytes of blocks that are one unit."""
    import torch.distributed as dist

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    plan = plan_job(recipe, arguments, dist.get_world_size())
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    with patch.object(data_parallel, "_TOGETHER", together):
        model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), dist.get_rank())
    rows = torch.randint(VOCABULARY, (1, plan.config.training.seq_len + 1))
    batches = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())] * microbatches
    model.forward_backward(batches)
    with Collectives() as seen:
        model.forward_backward(batches)
    return dict(seen.counts), seen.shapes


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> str:
    model = {"spec": "tests.tiny:DEEP_LLAMA", "flavor": "untied"}
    return str(write_recipe(tmp_path / "deep.toml", corpus, cache, model=model))


_RESHARD = "--parallelism.fsdp_reshard_after_forward="
_DDP = ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]


def test_whole_gradients_are_reduced_once_a_step_and_freed_ones_in_each_micro_batch(
    pool: RankPool, recipe: str
) -> None:
    for policy, reductions in (("never", UNITS), ("always", 3 * UNITS)):
        for counts, _ in pool.run(_counted, 2, recipe, [_RESHARD + policy], 3):
            assert counts["all_to_all"] == reductions, policy


def test_parameters_that_are_kept_are_gathered_once_a_step_and_freed_ones_twice_a_micro_batch(
    pool: RankPool, recipe: str
) -> None:
    # The last unit's backward follows its forward at once: it is kept in any case.
    for policy, gathers in (("never", UNITS), ("always", 3 * (2 * UNITS - 1))):
        for counts, _ in pool.run(_counted, 2, recipe, [_RESHARD + policy], 3):
            assert counts["all_gather"] == gathers, policy


def test_small_units_are_gathered_and_reduced_together(pool: RankPool, recipe: str) -> None:
    with torch.device("meta"):
        model = DEEP_LLAMA.build(DEEP_LLAMA.flavors["untied"])
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    for together, units in ((whole, 1), (whole - 1, 2), (whole // 3, 4)):
        for counts, _ in pool.run(_counted, 2, recipe, [_RESHARD + "always"], 1, together):
            assert counts["all_gather"] == 2 * units - 1
            assert counts["all_to_all"] == units


def test_units_are_joined_from_the_end_and_in_order() -> None:
    units = [[nn.Linear(10, size, bias=False, device="meta")] for size in (1, 2, 2, 30, 2, 2)]
    for most, sizes in (
        (0, [1] * 6),
        (39, [2, 1, 1, 1, 1]),
        (50, [3, 1, 2]),
        (330, [2, 2, 2]),
        (340, [3, 3]),
        (390, [6]),
    ):
        groups = data_parallel.joined(units, most)
        assert [len(group) for group in groups] == sizes, most
        assert [module for group in groups for module in group] == [unit[0] for unit in units]
    assert data_parallel.joined([], 4) == []


def test_replicas_are_reduced_in_the_last_micro_batch_only(pool: RankPool, recipe: str) -> None:
    for counts, _ in pool.run(_counted, 2, recipe, _DDP, 3):
        assert counts["all_reduce"] == UNITS


def test_a_pipeline_reduces_once_a_step(pool: RankPool, recipe: str) -> None:
    arguments = ["--parallelism.pipeline_parallel_degree=2"]
    for counts, _ in pool.run(_counted, 4, recipe, arguments, 4):
        assert counts["all_to_all"] == BLOCKS // 2 + 1


def _exchanges_and_sums(recipe: str) -> list[str]:
    """The order in which a step of two micro-batches starts FSDP's exchanges (x) and takes their sums (s)."""
    order: list[str] = []
    exchange, sum_up = torch.distributed.all_to_all_single, gloo._sum_up
    with pytest.MonkeyPatch.context() as watch:
        watch.setattr(torch.distributed, "all_to_all_single", lambda *a, **k: (order.append("x"), exchange(*a, **k))[1])
        watch.setattr(gloo, "_sum_up", lambda *a: (order.append("s"), sum_up(*a))[1])
        _counted(recipe, [], 2)
    return order[: len(order) // 2]


def test_sums_over_gloo_come_late_in_the_first_micro_batch_only(pool: RankPool, recipe: str) -> None:
    late = ["x"] * gloo._UNDER_WAY + ["x", "s"] * (UNITS - gloo._UNDER_WAY) + ["s"] * gloo._UNDER_WAY
    for order in pool.run(_exchanges_and_sums, 2, recipe):
        assert order == late + ["x", "s"] * UNITS  # the second adds to the gradients of the first


def test_tensor_parallel_blocks_gather_twice_and_scatter_twice_each_way(pool: RankPool, recipe: str) -> None:
    for counts, shapes in pool.run(_counted, 2, recipe, ["--parallelism.tensor_parallel_degree=2"], 1):
        # Each way: two a block; the embedding scatters, the output gathers.
        assert counts["all_gather"] == counts["reduce_scatter"] == 2 * (2 * BLOCKS + 1)
        part = VOCABULARY // 2
        assert not any(part in shape or VOCABULARY in shape for _, shape in shapes), "logits were communicated"


def test_logits_are_gathered_where_loss_parallel_is_off(pool: RankPool, recipe: str) -> None:
    arguments = ["--parallelism.tensor_parallel_degree=2", "--parallelism.disable_loss_parallel=true"]
    for _, shapes in pool.run(_counted, 2, recipe, arguments, 1):
        assert any(kind == "all_gather" and VOCABULARY // 2 in shape for kind, shape in shapes)


def _prefetched(recipe: str) -> list[tuple[int, int]]:
    """For each unit, how many are gathered ahead of it in forward and in backward order."""
    from torch.distributed.fsdp import FSDPModule

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    plan = plan_job(recipe, [], 2)
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    with patch.object(data_parallel, "_TOGETHER", 0):
        model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), 0)
    blocks = model.parts[0].get_submodule("layers").children()
    states = [block._get_fsdp_state() for block in blocks if isinstance(block, FSDPModule)]
    return [(len(s._states_to_forward_prefetch), len(s._states_to_backward_prefetch)) for s in states]


def test_each_block_gathers_the_next_one_ahead(pool: RankPool, recipe: str) -> None:
    assert pool.run(_prefetched, 2, recipe) == [[(1, 1)] * BLOCKS] * 2
