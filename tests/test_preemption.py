"""A signal to one rank: all ranks end at the same step, that step is saved, and none is run twice or lost."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.checkpoint.reading import last_lines
from tests.ranks import RankPool
from tests.test_trainer import _run, _train
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.elastic.preemption import RESTART
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.run_record import read_stopped


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("preemption") / "tiny.toml",
        corpus,
        cache,
        checkpoint={"enable": True, "interval": 4},
        training={"steps": 12},
        validation={"enable": True, "freq": 3, "steps": 4},
        data={"validation_fraction": 0.2},
        metrics={"log_sample_ids": True, "log_freq": 5},
    )


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, recipe: Path) -> Path:
    folder = recipe.with_name("undisturbed")
    _run(pool, 1, recipe, folder, "--metrics.log_freq=1")
    return folder


@contextmanager
def _signalled(moment: str, number: int, told: int) -> Iterator[None]:
    """Send this process a signal when it comes to a moment for the second time, if its rank is `told`; in the first
    step, which compiles, the first time."""
    from torchtitan_lite.checkpoint import saver
    from torchtitan_lite.data.loader import SampleStore, TrainLoader
    from torchtitan_lite.trainer import Trainer

    owner, name = {
        "data": (TrainLoader, "next_step"),
        "first step": (Trainer, "step"),
        "step": (Trainer, "step"),
        "validation": (SampleStore, "held_out_id"),
        "save": (saver, "write_parts"),
        "report": (Trainer, "_report"),
    }[moment]
    usual, calls = getattr(owner, name), iter(range(1, 10_000))

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == told and next(calls) == 1 + (moment != "first step"):
            os.kill(os.getpid(), number)
        if moment == "save":
            time.sleep(0.2)  # still being written when the step is over
        return usual(*args, **kwargs)

    with patch.object(owner, name, signalled):
        yield


def _train_until_told(moment: str, number: int, told: int, restarts: int, recipe: str, *overrides: str) -> int:
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = str(restarts)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)}
    with _signalled(moment, number, told):
        code = _train(recipe, *overrides)
    assert {n: signal.getsignal(n) for n in before} == before, "a rank that is done has its usual handlers again"
    os.environ.pop("TORCHELASTIC_MAX_RESTARTS")
    return code


MOMENTS = [
    ("data", signal.SIGTERM, "disabled"),
    ("first step", signal.SIGTERM, "disabled"),
    ("step", signal.SIGUSR1, "async"),
    ("validation", signal.SIGTERM, "disabled"),
    ("save", signal.SIGTERM, "disabled"),
    ("save", signal.SIGTERM, "async"),
    ("report", signal.SIGHUP, "async_with_pinned_mem"),
    ("step", signal.SIGINT, "disabled"),
]


@pytest.mark.parametrize(("moment", "number", "mode"), MOMENTS, ids=str)
def test_a_signal_to_one_rank_ends_all_at_a_saved_step(
    pool: RankPool, recipe: Path, undisturbed: Path, tmp_path: Path, moment: str, number: int, mode: str
) -> None:
    folder = tmp_path / "run"
    arguments = (str(recipe), f"--job.dump_folder={folder}", f"--checkpoint.async_mode={mode}")
    codes = pool.run(_train_until_told, 2, moment, number, 1, 0, *arguments, group=False)
    assert codes == [0, 0]
    stopped = read_stopped(folder)
    assert stopped is not None
    step = stopped["step"]
    assert 0 < step < 12
    assert (stopped["signal"], stopped["saved"]) == (signal.Signals(number).name, step)
    assert storage.published_steps(folder / "checkpoint")[-1] == step
    assert storage.verified(storage.step_folder(folder / "checkpoint", step)) == []
    assert read_lines(folder / "metrics.jsonl")[-1]["step"] == step, "the last step is logged, whatever log_freq"
    (event,) = (line for line in read_lines(folder / "events.jsonl") if line["event"] == "preemption")
    assert (event["step"], event["signal"]) == (step, signal.Signals(number).name)

    lines = _run(pool, 3, recipe, folder, "--metrics.log_freq=1")
    assert [line["step"] for line in lines if line["attempt"] == 2] == list(range(step + 1, 13))
    samples = read_lines(folder / "samples.jsonl")
    assert samples == last_lines(folder / "samples.jsonl"), "no step was run twice"
    assert samples == read_lines(undisturbed / "samples.jsonl")
    assert lines[-1]["loss"] == pytest.approx(read_lines(undisturbed / "metrics.jsonl")[-1]["loss"], rel=1e-6)
    assert read_stopped(folder) is None, "the mark is of the last attempt"


def test_where_others_can_go_on_they_are_started_again(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    """Under torchrun with restarts left: what was told to leave leaves, the rest forms anew without it."""
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}")
    codes = pool.run(_train_until_told, 3, "step", signal.SIGTERM, 2, 1, *arguments, group=False)
    assert codes == [RESTART, RESTART, 0]


def test_a_run_without_checkpoints_stops_too(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (str(recipe), f"--job.dump_folder={folder}", "--checkpoint.enable=false")
    assert pool.run(_train_until_told, 2, "step", signal.SIGTERM, 0, 0, *arguments, group=False) == [0, 0]
    stopped = read_stopped(folder)
    assert stopped is not None
    assert (stopped["step"], stopped["saved"]) == (2, None)
