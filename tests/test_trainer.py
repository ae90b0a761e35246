"""Whole runs of the trainer: the same numbers on every mesh, the same samples, resuming to the bit."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.reading import whole_tensors
from tests.ranks import RankPool
from tests.tiny import TINY, write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.observability.sinks import read_lines


def _train(recipe: str, *overrides: str) -> int:
    os.environ["LOG_RANK"] = "0"
    from torchtitan_lite import train

    return train.main([recipe, *overrides])


def _run(pool: RankPool, ranks: int, recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics.jsonl."""
    codes = pool.run(_train, ranks, str(recipe), f"--job.dump_folder={folder}", *overrides, group=False)
    assert codes == [0] * ranks
    return read_lines(folder / "metrics.jsonl")


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache)


def _settled(recipe: str, *overrides: str) -> list[int]:
    """Steps after which a run waits for its device, as far as its rates need it."""
    from torchtitan_lite.distributed.runtime import settle
    from torchtitan_lite.trainer import Trainer

    steps, step, waits = [0], Trainer.step, []

    def counted(trainer: Trainer, batches: Any) -> Any:
        steps.append(trainer.progress.step + 1)
        return step(trainer, batches)

    def waited(device: Any) -> None:
        waits.append(steps[-1])
        settle(device)

    with patch.object(Trainer, "step", counted), patch("torchtitan_lite.trainer.settle", waited):
        assert _train(recipe, *overrides) == 0
    return waits


def test_steps_end_before_a_save_or_a_validation_stops_the_clock(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    settings = ("--training.steps=7", "--checkpoint.interval=2", "--validation.enable=true", "--validation.freq=3")
    settings += ("--checkpoint.enable=true", "--data.validation_fraction=0.2", f"--job.dump_folder={tmp_path / 'run'}")
    assert pool.run(_settled, 1, str(recipe), *settings, group=False) == [[2, 3, 4, 6, 6, 7, 7]]


MESHES = [
    (2, "--parallelism.data_parallel_replicate_degree=1"),
    (2, "--parallelism.data_parallel_replicate_degree=2"),
    (3, "--parallelism.data_parallel_replicate_degree=1"),
    (4, "--parallelism.data_parallel_replicate_degree=2"),
]


def test_twenty_losses_and_the_samples_are_the_same_on_every_mesh(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    one = _run(pool, 1, recipe, tmp_path / "one", "--metrics.log_sample_ids=true")
    assert [line["step"] for line in one] == list(range(1, 21))
    assert one[-1]["loss"] < one[0]["loss"] - 1.0
    ids = read_lines(tmp_path / "one" / "samples.jsonl")
    assert all(len(line["ids"]) == 8 for line in ids)
    for ranks, mesh in MESHES:
        folder = tmp_path / f"{ranks}{mesh}"
        lines = _run(pool, ranks, recipe, folder, mesh, "--metrics.log_sample_ids=true")
        for line, expected in zip(lines, one, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6), (ranks, mesh, line["step"])
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert read_lines(folder / "samples.jsonl") == ids


def test_accumulation_and_an_odd_batch_change_nothing(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    odd = "--training.global_batch_size=7"
    one = _run(pool, 1, recipe, tmp_path / "one", odd, "--training.steps=8")
    accumulated = _run(pool, 1, recipe, tmp_path / "acc", odd, "--training.steps=8", "--training.local_batch_size=2")
    spread = _run(pool, 3, recipe, tmp_path / "three", odd, "--training.steps=8", "--training.local_batch_size=2")
    for lines in (accumulated, spread):
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=1e-6)


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (2, 1), (2, 2)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, ranks: int, replicate: int
) -> None:
    recipe = write_recipe(
        tmp_path / "tiny.toml",
        corpus,
        cache,
        checkpoint={"enable": True, "interval": 5},
        validation={"enable": True, "freq": 3, "steps": 2},
        data={"validation_fraction": 0.2},
        metrics={"log_sample_ids": True},
        parallelism={"data_parallel_replicate_degree": replicate},
    )
    whole = _run(pool, ranks, recipe, tmp_path / "whole")
    _run(pool, ranks, recipe, tmp_path / "parts", "--training.steps=7")
    parts = _run(pool, ranks, recipe, tmp_path / "parts")
    exact = ("step", "loss", "grad_norm", "lr", "tokens_seen")
    assert [[line[key] for key in exact] for line in parts] == [[line[key] for key in exact] for line in whole]
    assert [line["attempt"] for line in parts] == [1] * 7 + [2] * 13
    assert read_lines(tmp_path / "parts" / "samples.jsonl") == read_lines(tmp_path / "whole" / "samples.jsonl")
    events = read_lines(tmp_path / "parts" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "resume"] == [7]
    ends = (storage.step_folder(tmp_path / name / "checkpoint", 20) for name in ("parts", "whole"))
    saved, expected = map(whole_tensors, ends)
    assert set(saved) == set(expected)
    assert any("exp_avg_sq" in name for name in saved)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)

    def validations(name: str) -> list[tuple[int, float]]:
        lines = read_lines(tmp_path / name / "events.jsonl")
        return [(line["step"], line["loss"]) for line in lines if line["event"] == "validation"]

    # A run ends with a validation, so the first part has one at its last step.
    assert [entry for entry in validations("parts") if entry[0] != 7] == validations("whole")


def test_validation_does_not_touch_the_run(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    plain = _run(pool, 1, recipe, tmp_path / "plain", "--training.steps=6", "--data.validation_fraction=0.2")
    on = ("--validation.enable=true", "--validation.freq=2", "--data.validation_fraction=0.2", "--validation.steps=2")
    validated = _run(pool, 1, recipe, tmp_path / "validated", "--training.steps=6", *on)
    assert [line["loss"] for line in validated] == [line["loss"] for line in plain]
    _run(pool, 3, recipe, tmp_path / "spread", "--training.steps=6", *on)
    losses = {
        name: [e["loss"] for e in read_lines(tmp_path / name / "events.jsonl") if e["event"] == "validation"]
        for name in ("validated", "spread")
    }
    assert len(losses["validated"]) == 3
    assert losses["spread"] == pytest.approx(losses["validated"], rel=1e-6)


def test_checkpoints_are_kept_by_number_and_load_on_another_mesh(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    keep = ("--checkpoint.enable=true", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=2")
    folder = tmp_path / "run"
    first = _run(pool, 2, recipe, folder, *keep, "--training.steps=6")
    assert storage.published_steps(folder / "checkpoint") == [4, 6]
    moved = _run(pool, 3, recipe, folder, *keep, "--training.steps=10")
    whole = _run(pool, 1, recipe, tmp_path / "whole", "--training.steps=10")
    assert len(first) == 6
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in whole], rel=1e-6)
    events = [event["event"] for event in read_lines(folder / "events.jsonl")]
    assert "world-size change" in events


def test_the_run_folder_keeps_its_contract(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = _run(pool, 2, recipe, folder, "--training.steps=3", "--metrics.enable_tensorboard=true")
    line = lines[0]
    assert set(line) == {
        *("step", "loss", "grad_norm", "lr", "tokens_seen", "step_time_s", "data_time_s", "tps", "tflops", "mfu"),
        *("memory_peak_gib", "attempt"),
    }
    assert line["mfu"] is None
    assert line["tokens_seen"] == 8 * 32
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["parallelism"]["data_parallel_shard_degree"] == 2
    assert record["mesh"]["dp_shard"] == 2
    assert {"versions", "commit", "identity", "derived"} <= set(record)
    events = read_lines(folder / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "traffic", "end"]
    # Each rank sends the half of the gradients that is not its own, and gathers parameters once or twice.
    sent = {kind: gib * 2**30 for kind, gib in events[1]["by_kind"].items()}
    half = 4 * TINY.parameter_count() / 2
    assert sent["all_to_all"] == pytest.approx(half, rel=0.01)
    assert half <= sent["all_gather"] <= 2.01 * half
    assert all({"time", "step", "attempt"} <= set(event) for event in events)
    peaks = events[-1]["memory_peak_gib"]
    assert len(peaks) == 2
    assert max(peaks) == pytest.approx(lines[-1]["memory_peak_gib"], rel=0.1)
    assert list((folder / "tb").glob("events.out.tfevents.*"))


def test_deterministic_mode_repeats_to_the_bit(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    runs = [_run(pool, 2, recipe, tmp_path / name, "--training.steps=5", "--debug.deterministic=true") for name in "ab"]
    assert [line["loss"] for line in runs[0]] == [line["loss"] for line in runs[1]]
    other = _run(pool, 2, recipe, tmp_path / "c", "--training.steps=5", "--debug.seed=43")
    assert other[0]["loss"] != runs[0][0]["loss"]


@pytest.mark.parametrize("implementation", ["foreach", "for-loop"])
def test_optimizer_implementations_agree(pool: RankPool, recipe: Path, tmp_path: Path, implementation: str) -> None:
    fused = _run(pool, 2, recipe, tmp_path / "fused", "--training.steps=6")
    other = _run(
        pool, 2, recipe, tmp_path / "other", "--training.steps=6", f"--optimizer.implementation={implementation}"
    )
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in fused], rel=5e-5)


def test_a_rank_with_another_seed_is_found_before_training(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    codes = pool.run(_train_with_own_seed, 2, str(recipe), f"--job.dump_folder={tmp_path / 'run'}", group=False)
    assert codes == [2, 2]


def _train_with_own_seed(recipe: str, folder: str) -> int:
    return _train(recipe, folder, f"--debug.seed={os.environ['RANK']}")
