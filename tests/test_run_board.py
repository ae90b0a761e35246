"""What TensorBoard is told of a run: the settings of its recipe, and its config as text."""

from pathlib import Path

import pytest
import torch

from torchtitan_lite.config.loading import parse_toml
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.preflight import JobPlan, plan_job
from torchtitan_lite.run_board import open_board, settings, text

RECIPE = Path(__file__).parents[1] / "train_configs" / "llama3_debug.toml"
_P = "--parallelism."


def _plan(*overrides: str, ranks: int = 1, recipe: Path = RECIPE) -> JobPlan:
    return plan_job(recipe, overrides, ranks)


def test_settings_are_those_that_the_run_has() -> None:
    plan = _plan(
        "--optimizer.lr=0.25",
        f"{_P}tensor_parallel_degree=2",
        "--activation_checkpoint.mode=selective",
        "--compile.enable=true",
        '--model.converters=["quantize.linear.float8"]',
        "--quantize.linear.float8.recipe_name=rowwise",
        ranks=4,
    )
    found = {each.key: each.value for each in settings(plan)}
    expected = {
        "model": "llama3 debugmodel",
        "mesh": "dp_shard 2 x tp 2",
        "world_size": 4,
        "parallelism.data_parallel_shard_degree": 2,
        "parallelism.tensor_parallel_degree": 2,
        "parallelism.pipeline_parallel_degree": 1,
        "training.global_batch_size": 8,
        "training.seq_len": 256,
        "training.mixed_precision_param": "float32",
        "optimizer.name": "AdamW",
        "optimizer.lr": 0.25,
        "activation_checkpoint.mode": "selective 2",
        "compile.enable": True,
        "quantize.linear.float8.recipe_name": "rowwise",
        "debug.seed": 42,
    }
    assert {key: found[key] for key in expected} == expected
    assert [each.key for each in settings(_plan())] == list(found)
    assert {each.key for each in settings(plan) if each.first} >= {"model", "mesh", "optimizer.lr"}


def test_what_is_off_is_said_to_be() -> None:
    found = {each.key: each.value for each in settings(_plan())}
    assert found["quantize.linear.float8.recipe_name"] == "none"
    assert found["activation_checkpoint.mode"] == "none"
    assert found["compile.enable"] is False
    assert found["mesh"] == "1 rank"


def test_the_text_is_the_config_and_the_files_it_comes_from(tmp_path: Path) -> None:
    top = tmp_path / "top.toml"
    top.write_text(f'extends = "{RECIPE}"\n[optimizer]\nlr = 0.125\n')
    told = text(_plan(recipe=top))
    assert f"Recipe `{top}`, extends `{RECIPE}`\n" in told
    assert "- mesh: " in told
    code = told.split("```")[1].removeprefix("toml\n")
    assert parse_toml(code, "the text")["optimizer"]["lr"] == 0.125


@pytest.mark.parametrize(("rank", "on", "opens"), [(0, "true", True), (1, "true", False), (0, "false", False)])
def test_one_rank_writes_where_it_is_asked_for(tmp_path: Path, rank: int, on: str, opens: bool) -> None:
    plan = _plan(f"--metrics.enable_tensorboard={on}", f"--job.dump_folder={tmp_path}", ranks=2)
    board = open_board(plan, Runtime(rank, 2, torch.device("cpu"), "CPU"), 1)
    assert (board is not None) == opens
    if board is not None:
        board.close()
    assert (tmp_path / "tb").exists() == opens
