"""A model from outside: the documented example, within its promise, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from docs.examples.minimal_gpt import SPEC
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "minimal_gpt.py"


def test_the_example_is_short_and_counts_its_parameters() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150
    args = SPEC.flavors["small"]
    with torch.device("meta"):
        module = SPEC.build(args)
    assert sum(parameter.numel() for parameter in module.parameters()) == args.parameter_count()


def test_the_example_trains_alike_on_one_rank_and_two(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path
) -> None:
    model = {"spec": "docs.examples.minimal_gpt:SPEC", "flavor": "small"}
    # The corpus is small: a tokenizer of the example's 2,048 pieces needs more text than a test wants to train on.
    tokenizer = _small_tokenizer(tmp_path, corpus, cache)
    recipe = write_recipe(
        tmp_path / "gpt.toml", corpus, cache, model={**model, "tokenizer_path": str(tokenizer)}, optimizer={"lr": 1e-3}
    )
    one = _run(pool, 1, recipe, tmp_path / "one", "--training.steps=10")
    two = _run(pool, 2, recipe, tmp_path / "two", "--training.steps=10")
    assert one[-1]["loss"] < one[0]["loss"] - 0.5
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-6)


def _small_tokenizer(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    from torchtitan_lite.preflight import plan_job, prepare_job

    return prepare_job(plan_job(write_recipe(tmp_path / "tiny.toml", corpus, cache), (), 1)).tokenizer_path
