"""A run that is saved on one mesh goes on on another with the losses of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.observability.sinks import read_lines

_TP, _PP, _CP, _EP = (f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "pipeline", "context", "expert"))
_EP4 = "--parallelism.expert_parallel_degree=4"
_ZBV = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
CHAIN = [(2, (_TP,)), (2, (_PP, _ZBV)), (1, ()), (4, (_PP, _TP)), (2, (_CP,)), (3, ())]
EXPERTS = [(4, (_EP4,)), (2, (_EP,)), (1, ()), (4, (_PP, _TP)), (2, (_CP, _EP)), (3, ()), (4, (_TP, _EP))]


def _recipe(tmp_path: Path, corpus: Path, cache: Path, model: str = "DEEP_QWEN", flavor: str = "untied") -> Path:
    return write_recipe(
        tmp_path / "deep.toml",
        corpus,
        cache,
        model={"spec": f"tests.tiny:{model}", "flavor": flavor},
        moe={"aux_loss_coeff": 0.01, "bias_update_rate": 0.01} if model == "MOE" else {},
        checkpoint={"enable": True, "interval": 4},
        lr_scheduler={"total_steps": 24},
        validation={"enable": True, "freq": 2, "steps": 1},
        data={"validation_fraction": 0.2},
    )


@pytest.mark.parametrize(
    ("model", "chain"), [(("DEEP_QWEN", "untied"), CHAIN), (("MOE", "routed"), EXPERTS)], ids=["dense", "experts"]
)
def test_a_chain_of_meshes_is_one_run(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, model: tuple[str, str], chain: list[tuple[int, Any]]
) -> None:
    recipe = _recipe(tmp_path, corpus, cache, *model)
    steps = 2 * len(chain)
    one = _run(pool, 1, recipe, tmp_path / "one", f"--training.steps={steps}")
    for link, (ranks, mesh) in enumerate(chain, start=1):
        lines = _run(pool, ranks, recipe, tmp_path / "chain", *mesh, f"--training.steps={2 * link}")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=2e-6)
    validations = {name: _validations(tmp_path / name) for name in ("one", "chain")}
    assert list(validations["chain"]) == list(validations["one"]) == [2 * link for link in range(1, len(chain) + 1)]
    assert validations["chain"] == pytest.approx(validations["one"], rel=2e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in one], rel=1e-5)
    # What the biases come from: a bias that a resume lost would choose other experts.
    assert [line.get("moe_tokens_per_expert") for line in lines] == [line.get("moe_tokens_per_expert") for line in one]


def _validations(folder: Path) -> dict[int, float]:
    lines = read_lines(folder / "events.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["event"] == "validation"}


@pytest.mark.parametrize("mesh", [(_TP,), (_PP, _ZBV), (_EP,)])
def test_a_resumed_mesh_is_the_uninterrupted_one_to_the_bit(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, mesh: tuple[str, ...]
) -> None:
    recipe = _recipe(tmp_path, corpus, cache, *(("MOE", "shared") if _EP in mesh else ()))
    whole = _run(pool, 2, recipe, tmp_path / "whole", *mesh, "--training.steps=4")
    _run(pool, 2, recipe, tmp_path / "parts", *mesh, "--training.steps=2")
    parts = _run(pool, 2, recipe, tmp_path / "parts", *mesh, "--training.steps=4")
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


@pytest.mark.parametrize("mesh", [(_CP, _TP), (_EP4,), (_PP, _ZBV, _EP), (_TP, _EP)], ids=str)
def test_no_mesh_makes_torch_warn(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, mesh: tuple[str, ...]
) -> None:
    """What torch warns of is on its way to be an error, or is one that does not show."""
    recipe = _recipe(tmp_path, corpus, cache, *(("MOE", "shared") if "expert" in str(mesh) else ()))
    arguments = (*mesh, f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=2")
    assert pool.run(_train_strictly, 4, str(recipe), *arguments, group=False) == [0] * 4
