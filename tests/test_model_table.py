"""The table of a model's plan says what the modules are, whatever was asked for."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.ranks import RankPool
from tests.tiny import write_recipe


def _told(recipe: str, *overrides: str, together: int = 0) -> str:
    """together: bytes of small units that are joined."""
    import torch.distributed as dist

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed import data_parallel
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.model_table import told
    from torchtitan_lite.preflight import plan_job

    rank = dist.get_rank()
    plan = plan_job(recipe, overrides, dist.get_world_size())
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    with patch.object(data_parallel, "_TOGETHER", together):
        model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), rank)
    stages = [] if plan.pipeline is None else plan.pipeline.stages_of(plan.dims.coordinate(rank)["pp"])
    of = 0 if plan.pipeline is None else len(plan.pipeline.stages)
    return told(model.parts, plan.parallel, plan.config.activation_checkpoint, stages, of)


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache)


def _cells(text: str) -> dict[str, list[str]]:
    """By module, the words of its row."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.removeprefix("plan").split())}


def test_one_rank_holds_all_and_layers_alike_are_one_row(pool: RankPool, recipe: Path) -> None:
    (text,) = pool.run(_told, 1, str(recipe))
    assert text.splitlines()[:3] == [
        "plan      module                    count  parameters  split  dtype",
        "          tok_embeddings                1      24,576  whole  float32",
        "          layers.*.attention_norm       3         192  whole  float32",
    ]
    assert len(text.splitlines()) == 13


def test_what_was_split_and_gathered_how(pool: RankPool, recipe: Path) -> None:
    settings = (
        "--parallelism.tensor_parallel_degree=2",
        "--training.mixed_precision_param=bfloat16",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=2",
    )
    text = pool.run(_told, 4, str(recipe), *settings)[0]
    lines = [line for line in text.splitlines() if "attention.wo" in line]
    assert [" ".join(line.split()) for line in lines] == [
        f"layers.*.attention.wo {of} dp_shard 2 on dim 0, tp 2 on dim 1 rows layers.* float32 as bfloat16{extra}"
        for of, extra in (("2 8,192", ""), ("1 4,096", " recomputed"))
    ]
    norm = " ".join(_cells(text)["norm"])
    assert norm == "1 64 dp_shard 2 on dim 0, tp 2 copies sequence norm + output float32 as bfloat16"


@pytest.mark.parametrize(
    ("together", "unit"), [(400_000, "tok_embeddings + layers.*"), (2**20, "tok_embeddings … output")]
)
def test_units_that_were_joined_are_named(pool: RankPool, recipe: Path, together: int, unit: str) -> None:
    text = pool.run(partial(_told, together=together), 2, str(recipe))[0]
    assert unit in next(line for line in text.splitlines() if "attention.wo" in line)


def test_a_pipeline_stage_tells_its_own_part(pool: RankPool, recipe: Path) -> None:
    first, last = pool.run(_told, 2, str(recipe), "--parallelism.pipeline_parallel_degree=2")
    assert first.splitlines()[0] == "plan      stage 0 of 2, counted from 0"
    assert last.splitlines()[0] == "plan      stage 1 of 2, counted from 0"
    assert "tok_embeddings" in _cells(first)
    assert "output" in _cells(last)
    assert "output" not in _cells(first)
    counts = [int(_cells(text)["layers.*.attention.wq"][0]) for text in (first, last)]
    assert sum(counts) == 3
