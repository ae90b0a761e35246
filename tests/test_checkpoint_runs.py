"""Whole runs and their checkpoints: bad ones, failed saves, background saves, where a run starts from."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.reading import events, flip_a_bit, last_lines, whole_tensors
from tests.ranks import RankPool
from tests.test_trainer import _run as _train_all
from tests.test_trainer import _train
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.observability.sinks import read_lines


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.toml",
        corpus,
        cache,
        checkpoint={"enable": True, "interval": 4},
        training={"steps": 12},
        metrics={"log_sample_ids": True},
    )


def _run(pool: RankPool, ranks: int, recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train, and return the last line of each step."""
    _train_all(pool, ranks, recipe, folder, *overrides)
    return last_lines(folder / "metrics.jsonl")


def _checkpoint(folder: Path, step: int) -> Path:
    return storage.step_folder(folder / "checkpoint", step)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def _refused(pool: RankPool, ranks: int, recipe: Path, folder: Path, *overrides: str) -> str:
    """The line with which a run ends that all ranks refuse with 2."""
    codes = pool.run(_train_and_tell, ranks, str(recipe), f"--job.dump_folder={folder}", *overrides, group=False)
    assert [code for code, _ in codes] == [2] * ranks
    lines = {line for _, line in codes}
    assert len(lines) == 1, lines
    return lines.pop()


def _train_and_tell(*arguments: str) -> tuple[int, str]:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = _train(*arguments)
    return code, [line for line in told.getvalue().splitlines() if line.startswith("error: ")][-1]


def test_a_bad_checkpoint_is_named_and_the_one_before_it_taken(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    whole, folder = _run(pool, 1, recipe, tmp_path / "whole"), tmp_path / "run"
    _run(pool, 3, recipe, folder, "--training.steps=8")
    flip_a_bit(_checkpoint(folder, 8) / storage.file_of(2))
    lines = _run(pool, 2, recipe, folder)
    assert _losses(lines) == pytest.approx(_losses(whole), rel=1e-6)
    assert last_lines(folder / "samples.jsonl") == read_lines(tmp_path / "whole" / "samples.jsonl")
    (bad,) = events(folder, "bad checkpoint")
    assert bad["step"] == 8
    assert bad["path"] == str(folder / "checkpoint" / "step-00000008.bad")
    assert "step-00000008/rank-00002.safetensors: expected" in bad["why"]
    assert "found XXH3" in bad["why"]
    assert [event["step"] for event in events(folder, "resume")] == [4]
    assert _names(folder) == ["step-00000004", "step-00000008", "step-00000008.bad", "step-00000012"]


def test_strict_stops_at_a_bad_checkpoint(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run(pool, 2, recipe, folder, "--training.steps=8")
    (_checkpoint(folder, 8) / storage.file_of(1)).unlink()
    line = _refused(pool, 2, recipe, folder, "--checkpoint.strict=true")
    assert "step-00000008/rank-00001.safetensors: expected" in line
    assert "found no such file; move" in line
    assert _names(folder) == ["step-00000004", "step-00000008"]


def test_a_run_without_a_good_checkpoint_does_not_start_over(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run(pool, 2, recipe, folder, "--training.steps=8")
    for step in (4, 8):
        (_checkpoint(folder, step) / storage.MANIFEST).write_text("{}")
    line = _refused(pool, 2, recipe, folder)
    assert "none of its 2 checkpoints is good" in line
    assert _names(folder) == ["step-00000004.bad", "step-00000008.bad"]


def test_a_finished_run_whose_last_checkpoint_is_bad_is_not_finished(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    before = _run(pool, 2, recipe, folder)
    flip_a_bit(_checkpoint(folder, 12) / storage.file_of(0))
    assert _losses(_run(pool, 2, recipe, folder)) == _losses(before)
    assert storage.verified(_checkpoint(folder, 12)) == []


def test_load_step_goes_back_and_keeps_what_was_later_aside(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = _run(pool, 2, recipe, folder)
    after = _run(pool, 2, recipe, folder, "--checkpoint.load_step=4")
    assert _losses(after) == _losses(before)
    assert [line["attempt"] for line in after] == [1] * 4 + [2] * 8
    assert _names(folder) == [
        "step-00000004",
        "step-00000008",
        "step-00000008.superseded",
        "step-00000012",
        "step-00000012.superseded",
    ]
    assert [event["step"] for event in events(folder, "superseded checkpoint")] == [8, 12]


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_background_saves_hold_the_step_they_are_of(pool: RankPool, recipe: Path, tmp_path: Path, mode: str) -> None:
    every = ("--checkpoint.interval=1", "--checkpoint.keep_latest_k=0")
    plain = _run(pool, 2, recipe, tmp_path / "plain", *every)
    beside = _run(pool, 2, recipe, tmp_path / "beside", *every, f"--checkpoint.async_mode={mode}")
    assert _losses(beside) == _losses(plain)
    assert _names(tmp_path / "beside") == _names(tmp_path / "plain")
    for step in range(1, 13):
        found, expected = (whole_tensors(_checkpoint(tmp_path / name, step)) for name in ("beside", "plain"))
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected), step
    assert [event["step"] for event in events(tmp_path / "beside", "checkpoint")] == list(range(1, 13))


def _train_with_a_full_disk(fails: list[int], recipe: str, *overrides: str) -> tuple[int, str]:
    """The writes of the second rank that `fails` numbers end as on a full disk."""
    from torchtitan_lite.checkpoint import saver

    write, calls = saver.write_parts, iter(range(100))

    def full(path: Path, parts: Any) -> Any:
        if os.environ["RANK"] == "1" and next(calls) in fails:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, parts)

    with patch.object(saver, "write_parts", full):
        try:
            return _train_and_tell(recipe, *overrides)
        except IndexError:
            return 0, ""


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_that_fails_is_told_and_tried_again(pool: RankPool, recipe: Path, tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "run"
    arguments = (f"--job.dump_folder={folder}", f"--checkpoint.async_mode={mode}")
    ends = pool.run(_train_with_a_full_disk, 2, [1, 2], str(recipe), *arguments, group=False)
    assert ends == [(0, "")] * 2
    failed = events(folder, "checkpoint failed")
    saved = [event["step"] for event in events(folder, "checkpoint")]
    assert len(failed) == 2
    assert all("rank-00001.safetensors: No space left on device" in event["error"] for event in failed)
    if mode == "disabled":
        assert [event["step"] for event in failed] == [8, 9]
        assert saved == [4, 11, 12]
    assert saved[0] == 4
    assert saved[-1] == 12
    assert all(storage.verified(_checkpoint(folder, step)) == [] for step in saved)
    assert not [name for name in _names(folder) if name.startswith(".")]
    whole = _run(pool, 1, recipe, tmp_path / "whole")
    assert _losses(read_lines(folder / "metrics.jsonl")) == pytest.approx(_losses(whole), rel=1e-6)


def test_a_last_save_that_fails_ends_with_a_line_and_leaves_the_one_before(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ends = pool.run(_train_with_a_full_disk, 2, [2, 3, 4], str(recipe), f"--job.dump_folder={folder}", group=False)
    assert [code for code, _ in ends] == [2, 2]
    assert "the checkpoint of step 12 could not be written, the last one is of step 8; make room" in ends[0][1]
    assert _names(folder) == ["step-00000004", "step-00000008"]
    assert storage.verified(_checkpoint(folder, 8)) == []
    _run(pool, 2, recipe, folder)
    assert _names(folder) == ["step-00000004", "step-00000008", "step-00000012"]


def test_left_overs_of_a_killed_save_are_told_and_removed(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run(pool, 2, recipe, folder, "--training.steps=4")
    shutil.copytree(_checkpoint(folder, 4), folder / "checkpoint" / ".step-00000008.partial")
    _run(pool, 2, recipe, folder, "--training.steps=5")
    (event,) = events(folder, "left over")
    assert event["path"].endswith(".step-00000008.partial")
    assert _names(folder) == ["step-00000004", "step-00000005"]


def test_a_last_save_of_the_model_alone_is_not_resumed_and_says_why(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    folder, alone = tmp_path / "run", "--checkpoint.last_save_model_only=true"
    _run(pool, 2, recipe, folder, alone)
    assert not [name for name in whole_tensors(_checkpoint(folder, 12)) if not name.startswith("model.")]
    line = _refused(pool, 2, recipe, folder, "--training.steps=14", "--lr_scheduler.total_steps=20")
    assert "step-00000012: holds the model alone (it was saved with checkpoint.last_save_model_only = true)" in line
    assert "checkpoint.load_step" in line
    assert _names(folder) == ["step-00000004", "step-00000008", "step-00000012"], "nothing was renamed"
    _run(pool, 2, recipe, folder, "--training.steps=14", "--checkpoint.load_step=8")
    assert [event["step"] for event in events(folder, "resume")] == [8]


def test_a_new_run_starts_from_another_ones_tensors(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    _run(pool, 2, recipe, tmp_path / "first", "--checkpoint.last_save_model_only=true")
    path = f"--checkpoint.initial_load_path={tmp_path / 'first' / 'checkpoint'}"
    still = ("--training.steps=1", "--optimizer.lr=1e-30", "--optimizer.weight_decay=0")
    _run(pool, 3, recipe, tmp_path / "second", path, *still)
    first, second = (whole_tensors(_checkpoint(tmp_path / n, step)) for n, step in (("first", 12), ("second", 1)))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    (event,) = events(tmp_path / "second", "initial load")
    assert event["checkpoint"] == str(_checkpoint(tmp_path / "first", 12))
    # Once it has checkpoints of its own it goes on from those.
    shutil.rmtree(tmp_path / "first")
    _run(pool, 2, recipe, tmp_path / "second", path, "--training.steps=3")
    assert [event["step"] for event in events(tmp_path / "second", "resume")] == [1]


@pytest.mark.parametrize(
    ("excluded", "steps", "same_samples", "same_losses"),
    [
        ("[]", [5, 6, 7, 8], True, True),
        ('["optimizer"]', [5, 6, 7, 8], True, False),
        ('["dataloader"]', [5, 6, 7, 8], False, False),
        ('["train_state", "optimizer", "dataloader"]', [1, 2, 3, 4, 5, 6, 7, 8], False, False),
    ],
)
def test_a_new_run_takes_from_another_what_it_does_not_exclude(
    pool: RankPool,
    recipe: Path,
    tmp_path: Path,
    excluded: str,
    steps: list[int],
    same_samples: bool,
    same_losses: bool,
) -> None:
    whole = _run(pool, 1, recipe, tmp_path / "whole", "--training.steps=8")
    lines = _run(
        pool,
        2,
        recipe,
        tmp_path / "second",
        f"--checkpoint.initial_load_path={_checkpoint(tmp_path / 'whole', 4)}",
        "--checkpoint.initial_load_model_only=false",
        f"--checkpoint.exclude_from_loading={excluded}",
        "--training.steps=8",
    )
    assert [line["step"] for line in lines] == steps
    ids = [[line["ids"] for line in read_lines(tmp_path / n / "samples.jsonl")] for n in ("whole", "second")]
    assert (ids[1] == ids[0][4:]) is same_samples
    assert (_losses(lines) == pytest.approx(_losses(whole[4:]), rel=1e-6)) is same_losses
    if not same_samples:
        assert ids[1] == ids[0][: len(steps)]


REFUSALS = {
    "nothing left to do": (["--training.steps=4"], "step-00000004 is at step 4, and training.steps is 4; raise it"),
    "another model, its samples from the start": (
        ["--model.flavor=tied", '--checkpoint.exclude_from_loading=["dataloader"]'],
        "and this run has",
    ),
    "another model": (["--model.flavor=tied"], "and this run has"),
    "another sample length": (["--training.seq_len=16"], "was saved with training.seq_len = 32, and this run has 16"),
    "another seed": (["--debug.seed=7"], "was saved with debug.seed = 42, and this run has 7"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_checkpoint_of_another_run_is_refused(
    pool: RankPool, recipe: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    folder = tmp_path / "run"
    _run(pool, 2, recipe, folder, "--training.steps=4")
    before = {path: path.read_bytes() for path in sorted(_checkpoint(folder, 4).iterdir())}
    line = _refused(
        pool,
        2,
        recipe,
        tmp_path / "other",
        f"--checkpoint.initial_load_path={folder / 'checkpoint'}",
        "--checkpoint.initial_load_model_only=false",
        *overrides,
    )
    assert message in line
    assert {path: path.read_bytes() for path in sorted(_checkpoint(folder, 4).iterdir())} == before


def test_another_seed_or_model_does_not_resume_a_run(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    _run(pool, 1, recipe, tmp_path / "run", "--training.steps=1")
    for override, message in {
        "--debug.seed=7": "debug.seed = 42, this one 7",
        "--model.flavor=tied": "model.tied = False, this one True",
        "--training.seq_len=16": "training.seq_len = 32, this one 16",
        "--data.validation_fraction=0.3": "data = ",
        "--checkpoint.folder=elsewhere": "checkpoint.folder = checkpoint, this one elsewhere",
    }.items():
        assert message in _refused(pool, 1, recipe, tmp_path / "run", "--training.steps=2", override)


def test_a_checkpoint_copied_from_another_run_is_refused(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    """The run folder's config.json is this run's own; the checkpoint says what it was saved with."""
    _run(pool, 2, recipe, tmp_path / "other", "--training.steps=4", "--debug.seed=7")
    _run(pool, 2, recipe, tmp_path / "run", "--training.steps=4")
    shutil.copytree(_checkpoint(tmp_path / "other", 4), _checkpoint(tmp_path / "run", 8))
    line = _refused(pool, 2, recipe, tmp_path / "run", "--checkpoint.strict=true")
    assert "expected step 8 by its folder's name, found 4" in line
    shutil.rmtree(_checkpoint(tmp_path / "run", 8))
    shutil.rmtree(_checkpoint(tmp_path / "run", 4))
    shutil.copytree(_checkpoint(tmp_path / "other", 4), _checkpoint(tmp_path / "run", 4))
    line = _refused(pool, 2, recipe, tmp_path / "run")
    assert "was saved with debug.seed = 7, and this run has 42" in line
    assert _names(tmp_path / "run") == ["step-00000004"]


def test_a_chain_of_world_sizes_takes_the_same_samples_to_the_same_losses(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    """With a batch that no number of ranks but 1 divides, and an accumulation that is stopped in its middle."""
    batch = ("--training.global_batch_size=7", "--training.local_batch_size=1", "--training.steps=15")
    whole = _run(pool, 1, recipe, tmp_path / "whole", *batch)
    chain = tmp_path / "chain"
    for link, ranks in enumerate((4, 2, 3, 1, 4), start=1):
        if link == 3:
            codes = pool.run(_dies_in_a_step, 3, str(recipe), f"--job.dump_folder={chain}", *batch, group=False)
            assert codes == ["died"] * 3
        lines = _run(pool, ranks, recipe, chain, *batch[:2], f"--training.steps={3 * link}")
    assert last_lines(chain / "samples.jsonl") == read_lines(tmp_path / "whole" / "samples.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(_losses(whole), abs=1e-5)
    assert [event["step"] for event in events(chain, "resume")] == [3, 6, 6, 9, 12]


def _dies_in_a_step(recipe: str, *overrides: str) -> str:
    from torchtitan_lite.trainer import Trainer

    def dies(self: Trainer, batches: Any) -> None:
        self.model.forward_backward(batches[:1])
        raise KeyboardInterrupt

    with patch.object(Trainer, "step", dies):
        try:
            _train(recipe, *overrides)
        except KeyboardInterrupt:
            return "died"
    return "lived"


def _dies_while_a_save_is_in_flight(recipe: str, *overrides: str) -> str:
    import time

    from torchtitan_lite.checkpoint import saver
    from torchtitan_lite.trainer import Trainer

    write, step = saver.write_parts, Trainer.step

    def slow(path: Path, parts: Any) -> Any:
        time.sleep(0.5)
        return write(path, parts)

    def dies(self: Trainer, batches: Any) -> Any:
        if self.progress.step == 4:
            raise RuntimeError("a defect")
        return step(self, batches)

    with patch.object(saver, "write_parts", slow), patch.object(Trainer, "step", dies):
        try:
            _train(recipe, *overrides)
        except RuntimeError as error:
            return str(error)
    return "lived"


def test_an_error_waits_for_the_save_in_flight(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    arguments = (f"--job.dump_folder={tmp_path / 'run'}", "--checkpoint.async_mode=async")
    ends = pool.run(_dies_while_a_save_is_in_flight, 2, str(recipe), *arguments, group=False)
    assert ends == ["a defect"] * 2
    assert _names(tmp_path / "run") == ["step-00000004"]
    assert storage.verified(_checkpoint(tmp_path / "run", 4)) == []


def test_what_a_new_run_left_out_it_keeps_of_its_own(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    """exclude_from_loading is about initial_load_path, not about the run's own checkpoints."""
    _run(pool, 1, recipe, tmp_path / "before", "--training.steps=4")
    settings = (
        f"--checkpoint.initial_load_path={_checkpoint(tmp_path / 'before', 4)}",
        "--checkpoint.initial_load_model_only=false",
        '--checkpoint.exclude_from_loading=["optimizer", "train_state"]',
    )
    whole = _run(pool, 2, recipe, tmp_path / "whole", *settings, "--training.steps=6")
    _run(pool, 2, recipe, tmp_path / "parts", *settings, "--training.steps=3")
    assert _losses(_run(pool, 2, recipe, tmp_path / "parts", *settings, "--training.steps=6")) == _losses(whole)
