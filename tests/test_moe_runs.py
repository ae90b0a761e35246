"""Whole runs of mixtures of experts: what is logged, and bfloat16. Meshes: distributed/test_parity.py."""

import math
from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import MOE, write_recipe

ROOT = Path(__file__).parents[1]
_EP = "--parallelism.expert_parallel_degree=2"
_BF16 = "--training.mixed_precision_param=bfloat16"


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    model = {"spec": "tests.tiny:MOE", "flavor": "routed"}
    return write_recipe(tmp_path / "moe.toml", corpus, cache, model=model)


def test_the_loss_leaves_the_balance_losses_out_and_they_are_logged_apart(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    off, on = (
        _run(pool, 2, recipe, tmp_path / coeff, f"--moe.aux_loss_coeff={coeff}", "--training.steps=2")
        for coeff in ("0.001", "0.5")
    )
    for key in ("loss", "moe_aux_loss", "moe_tokens_per_expert"):
        assert on[0][key] == off[0][key]
    assert on[0]["moe_z_loss"] is None  # without a weight it is not computed
    # It is trained on all the same.
    assert on[0]["grad_norm"] != off[0]["grad_norm"]
    assert on[1]["moe_aux_loss"] < off[1]["moe_aux_loss"]


def test_what_is_logged_of_a_mixture(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    args = MOE.flavors["routed"]
    losses = ("--moe.aux_loss_coeff=0.01", "--moe.z_loss_coeff=0.01")
    (line,) = _run(pool, 2, recipe, tmp_path / "run", _EP, "--training.steps=1", *losses)
    counts = line["moe_tokens_per_expert"]
    assert [len(layer) for layer in counts] == [8] * args.n_layers
    assert [sum(layer) for layer in counts] == [8 * 32 * 2] * args.n_layers  # samples x tokens x choices
    assert line["moe_dropped"] == 0
    assert line["moe_largest_share"] == pytest.approx(max(map(max, counts)) / (8 * 32 * 2))
    assert 0.5 < line["moe_entropy"] < 1.0
    assert 1.0 <= line["moe_aux_loss"] < 2.0
    assert line["moe_z_loss"] == pytest.approx(math.log(8) ** 2, rel=0.05)  # of logits near 0


def test_dropped_choices_are_logged(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    (line,) = _run(pool, 2, recipe, tmp_path / "run", _EP, "--training.steps=1", "--moe.capacity_factor=0.5")
    # Half of all at least: each expert takes half of an even share.
    assert line["moe_dropped"] >= 8 * 32 * 2 * MOE.flavors["routed"].n_layers / 2


def test_the_load_becomes_even_where_the_bias_moves(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    still, moved = (
        _run(pool, 2, recipe, tmp_path / rate, f"--moe.bias_update_rate={rate}")[-8:] for rate in ("0.0", "0.003")
    )
    entropy_still, entropy_moved = (sum(line["moe_entropy"] for line in lines) / 8 for lines in (still, moved))
    assert 1 - entropy_moved < 0.6 * (1 - entropy_still)


def test_a_mixture_trains_in_bfloat16_on_shared_experts(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    """Rounding falls elsewhere on another mesh and moves some choices: not held to the choices of one process."""
    one = _run(pool, 1, recipe, tmp_path / "one", "--training.steps=4")
    for name, ranks, mesh in (
        ("one, bf16", 1, ()),
        ("ep", 2, (_EP,)),
        ("tp", 2, ("--parallelism.tensor_parallel_degree=2",)),
    ):
        lines = _run(pool, ranks, recipe, tmp_path / name, *mesh, _BF16, "--training.steps=4")
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=5e-3), name


def test_the_shipped_recipe_resumes_with_its_experts_on_fewer_ranks(
    pool: RankPool, tmp_path: Path, cache: Path
) -> None:
    """ep 2, then ep 1, with the losses of one process."""
    recipe = ROOT / "train_configs" / "qwen3_moe_debug.toml"
    settings = (f"--data.cache_folder={cache}", "--training.global_batch_size=4", "--training.seq_len=64")
    settings += ("--lr_scheduler.total_steps=4", "--validation.enable=false", "--metrics.enable_tensorboard=false")
    one = _run(pool, 1, recipe, tmp_path / "one", *settings, "--training.steps=4")
    for ranks, steps in ((2, 2), (1, 4)):
        mesh = (f"--parallelism.expert_parallel_degree={ranks}", f"--training.steps={steps}")
        parts = _run(pool, ranks, recipe, tmp_path / "parts", *settings, *mesh)
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in one], rel=2e-6)
    assert [line["moe_tokens_per_expert"] for line in parts] == [line["moe_tokens_per_expert"] for line in one]
    assert [line["attempt"] for line in parts] == [1, 1, 2, 2]
