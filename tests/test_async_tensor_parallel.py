"""Asynchronous tensor parallelism changes the compiled graph: collectives and products become fused operations.

Symmetric memory needs CUDA to run; what the compiler makes of a block shows on a process group that moves nothing.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.tiny import write_recipe


class _Seen(Exception):
    pass


def _operations(recipe: str, device: str, asynchronous: bool) -> list[str]:
    """Operations of the graph that the compiler makes of a block's forward on rank 0 of 2."""
    from unittest.mock import patch

    import torch
    import torch._inductor.config as inductor
    import torch.distributed as dist
    from torch.distributed._symmetric_memory import _test_mode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.data.loader import Batch
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    arguments = [
        "--parallelism.tensor_parallel_degree=2",
        "--compile.enable=true",
        f"--parallelism.enable_async_tensor_parallel={str(asynchronous).lower()}",
    ]
    operations: list[str] = []

    def keep(graph: Any) -> None:
        operations.extend(str(node.target) for node in graph.nodes if node.op == "call_function")
        raise _Seen  # kernels would take half a minute, and for the fused operations there are none on CPU

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with (
            _test_mode(),  # operations of symmetric memory fall back to plain collectives
            patch(
                "torch.distributed.is_nccl_available", lambda: True
            ),  # the compiler asks, and it does not matter here
            inductor.patch(post_grad_custom_post_pass=keep, _micro_pipeline_tp=False, force_disable_caches=True),
        ):
            plan = plan_job(recipe, arguments, 2)
            parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
            model = assemble(parts, build_mesh(plan.dims, device), torch.device(device), 0)
            # Two samples: torch's pass leaves the all-gathers of a single one alone.
            rows = torch.zeros((2, plan.config.training.seq_len + 1), dtype=torch.int64)
            with pytest.raises(Exception, match="_Seen"):
                model.forward_backward([Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())])
    finally:
        dist.destroy_process_group()
    return operations


def _fused(pool: RankPool, recipe: Path, device: str, asynchronous: bool) -> set[str]:
    (operations,) = pool.run(_operations, 1, str(recipe), device, asynchronous, group=False, timeout=300.0)
    assert operations
    kinds = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
    return {kind for kind in kinds for name in operations if kind in name}


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache)


@pytest.mark.gpu
def test_the_graph_changes_on_cuda(pool: RankPool, recipe: Path) -> None:
    assert _fused(pool, recipe, "cuda", False) == set()
    assert _fused(pool, recipe, "cuda", True) == {"fused_all_gather_matmul", "fused_matmul_reduce_scatter"}


def test_the_compiler_fuses_collectives_and_products_of_a_block(pool: RankPool, recipe: Path) -> None:
    assert _fused(pool, recipe, "cpu", False) == set()
    assert _fused(pool, recipe, "cpu", True) == {"fused_all_gather_matmul", "fused_matmul_reduce_scatter"}
