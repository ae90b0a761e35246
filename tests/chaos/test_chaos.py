"""A part of `make chaos`: some moments of a kill, each kind of damage, disks."""

import random
import shutil
from pathlib import Path

import pytest

from tests.chaos.damages import DAMAGES, damage, undetected
from tests.chaos.disks import CannotMount, full_checkpoint_disk, full_run_disk
from tests.chaos.kills import Kill, campaign
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.observability.sinks import read_lines


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.toml",
        corpus,
        cache,
        checkpoint={"enable": True, "interval": 2, "keep_latest_k": 2},
        training={"global_batch_size": 7, "steps": 18},
        metrics={"log_sample_ids": True},
    )


def test_a_kill_at_any_moment_loses_nothing(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    _run(pool, 1, recipe, tmp_path / "undisturbed")
    kills = [
        Kill(moment, 0 if moment == "load" else 2, "one", rank=0, ranks=2, async_mode="disabled")
        for moment in ("rename", "load")
    ]
    kills[1:1] = [Kill("write", 1, "one", rank=1, ranks=2, async_mode="async")]
    tally = campaign(pool, kills, recipe, tmp_path / "run", tmp_path / "undisturbed")
    assert tally.faults == []
    assert tally.kills == len(kills), "each moment came"
    assert tally.left_overs >= 1


def test_damage_of_every_kind_is_found(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    _run(pool, 3, recipe, tmp_path / "run", "--training.steps=4")
    older, good = (storage.step_folder(tmp_path / "run" / "checkpoint", step) for step in (2, 4))
    assert storage.verified(good) == []
    done, missed = undetected(good, older, tmp_path, 40, seed=1)
    assert missed == []
    assert set(done) == set(DAMAGES)


def test_what_is_damaged_is_not_loaded(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder, choose = tmp_path / "run", random.Random(2)
    _run(pool, 2, recipe, folder, "--training.steps=4", "--checkpoint.keep_latest_k=0")
    for count, kind in enumerate(DAMAGES, start=1):
        older, good = (storage.step_folder(folder / "checkpoint", step) for step in (2, 4))
        copy, what = damage(kind, good, older, tmp_path, choose)
        shutil.rmtree(good)
        copy.rename(good)
        _run(pool, 2, recipe, folder, "--training.steps=4", "--checkpoint.keep_latest_k=0")
        events = read_lines(folder / "events.jsonl")
        assert [line["step"] for line in events if line["event"] == "resume"] == [2] * count, what
        assert sum(line["event"] == "bad checkpoint" for line in events) == count, what


def test_training_goes_on_while_no_checkpoint_can_be_written(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("steps = 18", "steps = 60").replace("total_steps = 20", "total_steps = -1")
    recipe.write_text(text)
    _run(pool, 2, recipe, tmp_path / "undisturbed")
    try:
        assert full_checkpoint_disk(pool, recipe, tmp_path / "run", tmp_path / "undisturbed") == []
    except CannotMount as reason:
        pytest.skip(str(reason))


def test_a_full_disk_of_the_run_folder_ends_it_with_a_line(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("steps = 18", "steps = 100000").replace("= 20", "= -1"))
    try:
        assert full_run_disk(recipe, tmp_path / "run") == []
    except CannotMount as reason:
        pytest.skip(str(reason))
