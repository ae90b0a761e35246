"""Histograms of whole tensors, from shards on any mesh; and that looking changes nothing."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.observability.boards import histograms, scalars
from tests.ranks import RankPool
from tests.tiny import TINY, write_recipe
from torchtitan_lite.observability.histograms import Counted, Histograms, tag_of
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.observability.tensorboard import TensorBoard

EDGES = np.array([2.0**power * (1 + part / 8) for power in range(-40, 24) for part in range(8)] + [2.0**24])


def _reference(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """numpy's counts in the same buckets, and their edges."""
    beyond = np.array([*EDGES, np.inf])
    positive, negative = (np.histogram(sign * values, beyond)[0] for sign in (1, -1))
    around_zero = np.sum(np.abs(values) < EDGES[0])
    counts = np.concatenate([negative[::-1], [around_zero], positive])
    return counts, np.concatenate([-beyond[::-1], beyond])


def _counted(**tensors: Tensor) -> Counted:
    return Histograms(tensors.items(), None, torch.device("cpu")).count()


def _one(values: Tensor) -> tuple[dict[str, Any], dict[str, int]]:
    return _counted(w=values).read()


def test_counts_are_those_of_numpy(pool: RankPool) -> None:
    pool.run(_counts_are_those_of_numpy, 1)


def _counts_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16):
        values = (torch.randn(999, 31, generator=generator) * torch.logspace(-15, 9, 31)).to(dtype)
        values[0, :5] = 0.0
        values[1, :4] = torch.tensor([-0.0, 1e-40, 1.25, -1.25])  # on an edge: with what is farther from zero
        found, lost = _one(values)
        expected, edges = _reference(values.double().numpy().ravel())
        filled = expected.nonzero()[0]
        limits, counts = np.array(found["w"][0]), np.array(found["w"][1])
        own = counts.nonzero()[0]
        assert counts[own].tolist() == expected[filled].tolist()
        assert limits[own][1:].tolist() == edges[filled][1:].tolist()
        assert limits[own + 1][:-1].tolist() == edges[filled + 1][:-1].tolist()
        assert own[0] == 0
        assert own[-1] == len(counts) - 1 == len(limits) - 2
        assert np.isfinite(limits).all()
        assert (np.diff(limits) > 0).all()
        assert not lost


def test_empty_buckets_between_others_are_one(pool: RankPool) -> None:
    pool.run(_empty_buckets_between_others, 1)


def _empty_buckets_between_others() -> None:
    found, _ = _one(torch.tensor([-1.0, 1.0, 1.0, 8.0]))
    assert found["w"] == ([-1.125, -1.0, 1.0, 1.125, 8.0, 9.0], [1.0, 0.0, 2.0, 0.0, 1.0])


def test_what_is_no_finite_number_is_told_apart(pool: RankPool) -> None:
    pool.run(_what_is_no_finite_number, 1)


def _what_is_no_finite_number() -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), largest, -largest, 1.0])
    found, lost = _one(values)
    assert sum(found["w"][1]) == 3
    assert lost == {"w": 3}
    assert _one(torch.full((4,), float("nan"))) == ({}, {"w": 4})


def test_more_than_a_chunk_is_counted_whole(pool: RankPool) -> None:
    pool.run(_more_than_a_chunk, 1)


def _more_than_a_chunk() -> None:
    from torchtitan_lite.observability import histograms as module

    whole, chunk = _one(torch.arange(100.0)), module._CHUNK
    module._CHUNK = 7
    try:
        assert _one(torch.arange(100.0)) == whole
    finally:
        module._CHUNK = chunk


def test_a_gradient_that_is_not_there_has_no_histogram(pool: RankPool) -> None:
    pool.run(_without_a_gradient, 1)


def _without_a_gradient() -> None:
    model = nn.Linear(2, 3)
    model.weight.grad = torch.ones(3, 2)
    found, _ = Histograms(model.named_parameters(), None, torch.device("cpu")).count().read()
    assert set(found) == {"weight", "weight (gradient)", "bias"}
    limits, counts = found["weight (gradient)"]
    assert counts == [6.0]
    assert limits[0] <= 1.0 < limits[1]


def test_what_is_no_whole_number_of_copies_is_a_defect() -> None:
    table = torch.zeros(2, 1, 1028, dtype=torch.float64)
    table[0, 0, 300] = 5.0
    with pytest.raises(AssertionError, match="w: 5 elements counted on all ranks, of 3"):
        Counted(["w"], [3], table).read()


def test_tags_group_by_layer() -> None:
    names = ("layers.10.attention.wq.weight", "tok_embeddings.weight", "norm", "layers.0.scale")
    tags = ["layers.10/attention.wq.weight", "tok_embeddings/weight", "norm", "layers.0/scale"]
    assert [tag_of(name) for name in names] == tags


def test_a_board_shows_what_was_counted_and_what_is_in_no_bucket(tmp_path: Path, pool: RankPool) -> None:
    (counted,) = pool.run(_counted_with_a_nan, 1)
    board = TensorBoard(tmp_path, 1)
    board.histograms(4, counted)
    board.close()
    ((step, buckets),) = histograms(tmp_path)["w"].items()
    assert (step, sum(buckets.values())) == (4, 2)
    assert scalars(tmp_path) == {"not_finite/w": [(4, 1.0)]}


def _counted_with_a_nan() -> Counted:
    return _counted(w=torch.tensor([1.0, 2.0, float("nan")]))


# ---- on meshes


def _train(arguments: list[str]) -> int:
    os.environ["LOG_RANK"] = "0"
    from torchtitan_lite import train

    return train.main(arguments)


EVERYTHING = ("--metrics.enable_tensorboard=true", "--metrics.histogram_freq=2")
_P = "--parallelism."
MESHES = {
    "fsdp": (2, ()),
    "ddp": (2, (f"{_P}data_parallel_replicate_degree=2",)),
    "uneven fsdp": (3, ()),
    "hsdp x tp": (4, (f"{_P}data_parallel_shard_degree=2", f"{_P}tensor_parallel_degree=2")),
    "pp x tp": (4, (f"{_P}pipeline_parallel_degree=2", f"{_P}tensor_parallel_degree=2")),
    "pp x ddp": (4, (f"{_P}pipeline_parallel_degree=2", f"{_P}data_parallel_replicate_degree=2")),
    "offload": (2, ("--training.enable_cpu_offload=true",)),
}
EXPERTS = {
    "ep": (2, (f"{_P}expert_parallel_degree=2",)),
    "ep x tp": (4, (f"{_P}expert_parallel_degree=2", f"{_P}tensor_parallel_degree=2")),
}
_MOE = ("--model.spec=tests.tiny:MOE", "--model.flavor=routed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipes") / "tiny.toml", corpus, cache, training={"steps": 2})


def _run(pool: RankPool, ranks: int, recipe: Path, folder: Path, *overrides: str) -> Path:
    codes = pool.run(_train, ranks, [str(recipe), f"--job.dump_folder={folder}", *overrides], group=False)
    assert codes == [0] * ranks
    return folder


@pytest.fixture(scope="module")
def alone(pool: RankPool, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        "dense": _run(pool, 1, recipe, folder / "dense", *EVERYTHING),
        "experts": _run(pool, 1, recipe, folder / "experts", *EVERYTHING, *_MOE),
    }


def _moved(one: dict[float, float], other: dict[float, float]) -> float:
    """Elements in another bucket."""
    return sum(abs(one.get(limit, 0) - other.get(limit, 0)) for limit in one.keys() | other.keys()) / 2


def test_one_process_shows_every_parameter_and_gradient(alone: dict[str, Path]) -> None:
    found = histograms(alone["dense"] / "tb")
    assert {"layers.0/attention.wq.weight", "layers.2/ffn_norm.weight", "tok_embeddings/weight"} <= set(found)
    parameters = [tag for tag in found if "(gradient)" not in tag]
    assert {f"{tag} (gradient)" for tag in parameters} == set(found) - set(parameters)
    assert all(set(steps) == {2} for steps in found.values())
    assert sum(sum(found[tag][2].values()) for tag in parameters) == TINY.parameter_count()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=pytest.mark.ranks(meshes[name][0]))
        for kind, meshes in (("dense", MESHES), ("experts", EXPERTS))
        for name in meshes
    ],
)
def test_a_mesh_shows_what_one_process_does(
    pool: RankPool, recipe: Path, alone: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    ranks, overrides = {**MESHES, **EXPERTS}[name]
    model = _MOE if kind == "experts" else ()
    found = histograms(_run(pool, ranks, recipe, tmp_path / "run", *EVERYTHING, *overrides, *model) / "tb")
    expected = histograms(alone[kind] / "tb")
    assert set(found) == set(expected)
    for tag, steps in expected.items():
        elements = sum(steps[2].values())
        assert sum(found[tag][2].values()) == elements, tag
        # Meshes differ in the last bit, which puts one here and there beyond an edge.
        assert _moved(steps[2], found[tag][2]) <= max(1, 2e-3 * elements), tag


def test_turning_everything_on_changes_no_bit(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    long = ("--training.steps=6", "--data.validation_fraction=0.2", "--validation.enable=true", "--validation.steps=1")
    plain = _run(pool, 2, recipe, tmp_path / "plain", *long)
    shown = _run(pool, 2, recipe, tmp_path / "shown", *long, *EVERYTHING, "--metrics.histogram_freq=1")
    exact = ("step", "loss", "grad_norm", "lr")

    def numbers(folder: Path) -> list[list[float]]:
        return [[line[key] for key in exact] for line in read_lines(folder / "metrics.jsonl")]

    assert numbers(shown) == numbers(plain)
    assert len(numbers(shown)) == 6
    assert not (plain / "tb").exists()
    curves = scalars(shown / "tb")
    losses = [np.float32(line["loss"]) for line in read_lines(shown / "metrics.jsonl")]
    assert [np.float32(value) for _, value in curves["loss_metrics/global_avg_loss"]] == losses
    assert {"throughput(tps)/median", "validation_metrics/loss", "memory/max_resident(GiB)", "n_tokens_seen"} <= set(
        curves
    )
    assert "mfu(%)" not in curves  # unknown on a CPU
    assert set(histograms(shown / "tb")["norm/weight"]) == set(range(1, 7))


def test_gradients_are_shown_as_they_are_before_clipping(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    asked = ("--training.steps=1", "--metrics.enable_tensorboard=true", "--metrics.histogram_freq=1")
    found = []
    for norm in ("1e-3", "1e9"):
        folder = _run(pool, 1, recipe, tmp_path / norm, *asked, f"--training.max_norm={norm}")
        assert read_lines(folder / "metrics.jsonl")[0]["grad_norm"] > 1e-2
        found.append(histograms(folder / "tb"))
    assert found[0] == found[1]


def test_parameters_that_are_gathered_in_float8_are_shown_as_they_are_kept(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    prefix = "--quantize.linear.float8"
    float8 = ('--model.converters=["quantize.linear.float8"]', f"{prefix}.emulate=true")
    gathered = f"{prefix}.enable_fsdp_float8_all_gather=true"
    asked = (*float8, "--training.steps=1", "--metrics.enable_tensorboard=true", "--metrics.histogram_freq=1")
    alone = histograms(_run(pool, 1, recipe, tmp_path / "alone", *asked) / "tb")
    found = histograms(_run(pool, 2, recipe, tmp_path / "spread", *asked, gathered) / "tb")
    parameters = {tag for tag in alone if "(gradient)" not in tag}
    assert {tag: found[tag] for tag in parameters} == {tag: alone[tag] for tag in parameters}
    assert set(found) == set(alone)
