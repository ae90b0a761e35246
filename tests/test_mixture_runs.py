"""Whole runs on a mixture: the same samples and losses on any number of ranks, resizes in between included."""

from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.observability.sinks import read_lines


def _ids(folder: Path) -> list[list[int]]:
    return [line["ids"] for line in read_lines(folder / "samples.jsonl")]


def _validations(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(folder / "events.jsonl") if line["event"] == "validation"}


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    """Documents, masked; 7 samples of one source to 3 of another that is over in a few steps; a batch of 7."""
    other = tmp_path / "other"
    other.mkdir()
    for path in write_corpus(other, documents=8, sentences=3).iterdir():
        path.write_text(path.read_text().upper())
    return write_recipe(
        tmp_path / "mixed.toml",
        corpus,
        cache,
        training={"dataset": "mixture", "dataset_path": "", "global_batch_size": 7, "steps": 14},
        data={
            "mixture_paths": [str(corpus), str(other)],
            "mixture_weights": [7, 3],
            "document_mask": True,
            "validation_fraction": 0.2,
        },
        validation={"enable": True, "freq": 7, "steps": 2},
        checkpoint={"enable": True, "interval": 100},
        metrics={"log_sample_ids": True},
    )


def test_resizes_change_neither_samples_nor_losses(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    whole = _run(pool, 1, recipe, tmp_path / "whole")
    chain = tmp_path / "chain"
    for ranks, steps in ((1, 4), (3, 9), (2, 14)):
        lines = _run(pool, ranks, recipe, chain, f"--training.steps={steps}", "--training.local_batch_size=2")
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert _ids(chain) == _ids(tmp_path / "whole")
    for line, expected in zip(lines, whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5), line["step"]
    assert [event["step"] for event in read_lines(chain / "events.jsonl") if event["event"] == "resume"] == [4, 9]
    expected, found = _validations(tmp_path / "whole"), _validations(chain)
    assert set(expected) == {7, 14}
    assert {step: found[step] for step in expected} == pytest.approx(expected, abs=1e-5)
    ids = [sample for step in _ids(chain) for sample in step]
    assert len(set(ids)) < len(ids), "no source has gone into a second epoch: the test is too short"


def test_the_log_shows_the_weights_in_every_window(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    from torchtitan_lite.preflight import plan_job, prepare_job

    folder = tmp_path / "run"
    _run(pool, 2, recipe, folder, "--training.steps=10", "--validation.enable=false")
    first, second = prepare_job(plan_job(recipe, [], 1)).sources
    split = first.train.samples(32)
    ids = [sample for step in _ids(folder) for sample in step]
    for window in range(7):
        assert sum(sample < split for sample in ids[10 * window : 10 * window + 10]) == 7, window
    assert max(ids) < split + second.train.samples(32)
