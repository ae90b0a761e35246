"""A run that is saved on one mesh goes on on another with the losses of one process."""

from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.observability.sinks import read_lines

_TP, _PP, _CP = (f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "pipeline", "context"))
_ZBV = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
CHAIN = [(2, (_TP,)), (2, (_PP, _ZBV)), (1, ()), (4, (_PP, _TP)), (2, (_CP,)), (3, ())]


def _recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path / "deep.toml",
        corpus,
        cache,
        model={"spec": "tests.tiny:DEEP_QWEN", "flavor": "untied"},
        checkpoint={"enable": True, "interval": 4},
        validation={"enable": True, "freq": 3, "steps": 1},
        data={"validation_fraction": 0.2},
    )


def test_a_chain_of_meshes_is_one_run(pool: RankPool, tmp_path: Path, corpus: Path, cache: Path) -> None:
    recipe = _recipe(tmp_path, corpus, cache)
    steps = 3 * len(CHAIN)
    one = _run(pool, 1, recipe, tmp_path / "one", f"--training.steps={steps}")
    for link, (ranks, mesh) in enumerate(CHAIN, start=1):
        lines = _run(pool, ranks, recipe, tmp_path / "chain", *mesh, f"--training.steps={3 * link}")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=2e-6)
    validations = {name: _validations(tmp_path / name) for name in ("one", "chain")}
    assert list(validations["chain"]) == list(validations["one"]) == [3 * link for link in range(1, len(CHAIN) + 1)]
    assert validations["chain"] == pytest.approx(validations["one"], rel=2e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in one], rel=1e-5)


def _validations(folder: Path) -> dict[int, float]:
    lines = read_lines(folder / "events.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["event"] == "validation"}


@pytest.mark.parametrize("mesh", [(_TP,), (_PP, _ZBV)])
def test_a_resumed_mesh_is_the_uninterrupted_one_to_the_bit(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, mesh: tuple[str, ...]
) -> None:
    recipe = _recipe(tmp_path, corpus, cache)
    whole = _run(pool, 2, recipe, tmp_path / "whole", *mesh, "--training.steps=6")
    _run(pool, 2, recipe, tmp_path / "parts", *mesh, "--training.steps=3")
    parts = _run(pool, 2, recipe, tmp_path / "parts", *mesh, "--training.steps=6")
    exact = ("step", "loss", "grad_norm")
    assert [[line[key] for key in exact] for line in parts] == [[line[key] for key in exact] for line in whole]


def _train_strictly(recipe: str, *arguments: str) -> int:
    import os
    import warnings

    from torchtitan_lite import train

    os.environ["LOG_RANK"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return train.main([recipe, *arguments])


@pytest.mark.parametrize("mesh", [(_TP,), (_CP,), (_PP, _ZBV), (_CP, _TP)], ids=str)
def test_no_mesh_makes_torch_warn(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, mesh: tuple[str, ...]
) -> None:
    """What torch warns of is on its way to be an error, or is one that does not show."""
    recipe = _recipe(tmp_path, corpus, cache)
    arguments = (*mesh, f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=2")
    assert pool.run(_train_strictly, 4, str(recipe), *arguments, group=False) == [0] * 4
