"""Whole runs under the profiler: the same numbers, files that say where time went, and no rank that waits for ever."""

import gzip
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import RankPool
from tests.test_trainer import _run, _train
from tests.tiny import write_recipe
from torchtitan_lite.cli import main
from torchtitan_lite.compare.runs import read_run
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.preflight import plan_job, prepare_job
from torchtitan_lite.profiling.breakdown import KINDS, STEP

_SLEEP_S = 0.1
_TRACED = (
    "--profiling.enable_profiling=true",
    "--profiling.profile_freq=4",
    "--profiling.profiler_warmup=1",
    "--profiling.profiler_active=2",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("profiled") / "tiny.toml",
        corpus,
        cache,
        training={"steps": 9},
        validation={"enable": True, "freq": 4, "steps": 1},
        data={"validation_fraction": 0.2},
        checkpoint={"enable": True, "interval": 4},
    )


@pytest.fixture(scope="module")
def plain(pool: RankPool, recipe: Path) -> list[dict[str, Any]]:
    return _run(pool, 2, recipe, recipe.with_name("plain"))


def _numbers(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == name]


def _train_with_a_slow_rank(recipe: str, *overrides: str) -> int:
    from torchtitan_lite.data.loader import TrainLoader

    usual = TrainLoader.next_step

    def slow(self: Any) -> Any:
        time.sleep(_SLEEP_S if os.environ["RANK"] == "1" else 0.0)
        return usual(self)

    with patch.object(TrainLoader, "next_step", slow):
        return _train(recipe, *overrides)


@pytest.fixture(scope="module")
def profiled(pool: RankPool, recipe: Path) -> Path:
    folder = recipe.with_name("profiled")
    arguments = (str(recipe), f"--job.dump_folder={folder}", *_TRACED, "--profiling.phases=true")
    assert pool.run(_train_with_a_slow_rank, 2, *arguments, group=False) == [0, 0]
    return folder


def test_losses_are_the_same_to_the_bit(profiled: Path, plain: list[dict[str, Any]]) -> None:
    assert _numbers(read_lines(profiled / "metrics.jsonl")) == _numbers(plain)


def test_each_rank_leaves_a_trace_of_the_steps_of_a_window(profiled: Path) -> None:
    assert sorted(each.name for each in (profiled / "profile_traces").iterdir()) == ["iteration_4", "iteration_8"]
    for rank in (0, 1):
        with gzip.open(profiled / "profile_traces" / "iteration_4" / f"rank{rank}_trace.json.gz") as packed:
            events = json.load(packed)["traceEvents"]
        marks = [each["name"] for each in events if each["name"].startswith(STEP)]
        assert marks == [f"{STEP}3", f"{STEP}4"]
        assert any(each["name"] == "aten::mm" for each in events)


def test_a_breakdown_adds_up_to_the_step_and_shows_who_waits(profiled: Path) -> None:
    first, second = _events(profiled, "profile")
    assert [first["step"], second["step"]] == [4, 8]
    assert (second["steps"], second["ranks"], set(second["step_breakdown"])) == ([7, 8], 2, set(KINDS))
    times = {line["step"]: line["step_time_s"] for line in read_lines(profiled / "metrics.jsonl")}
    parts = second["step_breakdown"]
    assert sum(parts.values()) == pytest.approx((times[7] + times[8]) / 2, rel=0.25)
    assert parts["compute_s"] > 0.001
    assert parts["copies_s"] == 0.0
    assert all(value >= 0.0 for value in parts.values())
    folder = profiled / "profile_traces" / "iteration_8"
    own = [json.loads((folder / f"rank{rank}_breakdown.json").read_text()) for rank in (0, 1)]
    for kind in KINDS:
        assert parts[kind] == pytest.approx((own[0][kind] + own[1][kind]) / 2)
    # Rank 1 sleeps before each step, and rank 0 waits for it in a collective.
    assert own[0]["communication_exposed_s"] - own[1]["communication_exposed_s"] > 0.5 * _SLEEP_S
    assert own[1]["idle_s"] > _SLEEP_S
    assert own[1]["idle_s"] - own[0]["idle_s"] > 0.5 * _SLEEP_S
    most = max((0, 1), key=lambda rank: own[rank]["compute_s"])
    assert second["most_compute"] == {"rank": most, **own[most]}
    assert read_run(profiled).breakdown == parts


def test_phases_of_both_ranks_are_on_one_clock(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(profiled), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ranks"], report["attempts"], report["warnings"]) == (2, 1, [])
    spans = [each for each in json.loads(Path(report["trace"]).read_text())["traceEvents"] if each["ph"] == "X"]
    names = {each["name"] for each in spans}
    assert {"load", "forward_backward", "forward", "backward", "clip", "optimizer", "agree", "log"} <= names
    assert {"checkpoint", "validation", "profile", "resume"} <= names

    def of(rank: int, name: str, step: int) -> tuple[float, float]:
        # The first of the step: ranks agree again while they validate, and after a save.
        one = next(e for e in spans if (e["pid"], e["name"], e["args"]["step"]) == (rank + 1, name, step))
        return one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6

    for step in range(2, 10):
        assert of(1, "load", step)[1] - of(1, "load", step)[0] > _SLEEP_S
        # Nobody has agreed before the last one has come to it.
        assert of(0, "agree", step)[1] > of(1, "agree", step)[0]
        assert of(1, "agree", step)[1] > of(0, "agree", step)[0]
        begin, end = of(0, "forward_backward", step)
        assert begin < of(0, "forward", step)[0] < of(0, "forward", step)[1] <= of(0, "backward", step)[0]
        assert of(0, "backward", step)[1] <= end
    whole = sum(each["dur"] for each in spans if each["pid"] == 1 and each["name"] not in ("forward", "backward"))
    first = min(each["ts"] for each in spans if each["pid"] == 1)
    last = max(each["ts"] + each["dur"] for each in spans if each["pid"] == 1)
    assert whole == pytest.approx(last - first, rel=0.02), "the loop is always in one of them"


def test_what_stages_do_is_in_the_phases_too(
    pool: RankPool, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--training.steps=2", "--parallelism.pipeline_parallel_degree=2", "--validation.enable=false")
    without = _run(pool, 2, recipe, tmp_path / "without", *steps)
    marked = _run(pool, 2, recipe, tmp_path / "run", *steps, "--profiling.phases=true")
    assert _numbers(marked) == _numbers(without)
    assert main(["trace", str(tmp_path / "run"), "--json"]) == 0
    spans = json.loads(Path(json.loads(capsys.readouterr().out)["trace"]).read_text())["traceEvents"]
    for stage in (0, 1):
        for name in ("forward", "backward"):
            found = [e for e in spans if e["name"] == f"{name} of stage {stage}" and e["args"]["step"] == 2]
            assert [each["pid"] for each in found] == [stage + 1] * 8, "one for each of 8 micro-batches"


@contextmanager
def _told_to_stop(step: int) -> Iterator[None]:
    from torchtitan_lite.trainer import Trainer

    usual = Trainer.step

    def told(self: Any, batches: Any) -> Any:
        if self.progress.step + 1 == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, batches)

    with patch.object(Trainer, "step", told):
        yield


def _train_and_stop(step: int, recipe: str, *overrides: str) -> int:
    with _told_to_stop(step):
        return _train(recipe, *overrides)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_that_stops_within_a_window_ends_and_goes_on(
    pool: RankPool, recipe: Path, plain: list[dict[str, Any]], tmp_path: Path, step: int
) -> None:
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}", *_TRACED)
    assert pool.run(_train_and_stop, 2, step, *arguments, group=False, timeout=30.0) == [0, 0]
    (stopped,) = _events(tmp_path / "run", "preemption")
    assert stopped["step"] == step
    assert not (tmp_path / "run" / "profile_traces").exists(), "its time is for saving"
    lines = _run(pool, 2, recipe, tmp_path / "run", *_TRACED)
    assert _numbers(lines) == _numbers(plain)
    assert [event["step"] for event in _events(tmp_path / "run", "profile")] == ([4, 8] if step < 3 else [8])


def _train_on_a_full_disk(recipe: str, *overrides: str) -> int:
    from torchtitan_lite.profiling import profiler

    usual = profiler._written

    def written(profile: Any, path: Path) -> Any:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return usual(profile, path)

    with patch.object(profiler, "_written", written):
        return _train(recipe, *overrides)


def test_a_rank_that_cannot_write_keeps_no_other(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}", *_TRACED, "--training.steps=5")
    assert pool.run(_train_on_a_full_disk, 2, *arguments, group=False, timeout=30.0) == [0, 0]
    (event,) = _events(tmp_path / "run", "profile")
    assert (event["ranks"], event["most_compute"]["rank"]) == (1, 0)


def _train_with_a_slow_disk(recipe: str, *overrides: str) -> int:
    from torchtitan_lite.checkpoint import saver

    usual = saver._write_own

    def slow(*args: Any) -> Any:
        time.sleep(3.0 if os.environ["RANK"] == "1" else 0.0)
        return usual(*args)

    with patch.object(saver, "_write_own", slow):
        return _train(recipe, *overrides)


def test_a_save_in_flight_does_not_get_what_profilers_gather(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    overrides = ("--training.steps=4", "--checkpoint.interval=2", "--checkpoint.async_mode=async")
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}", *_TRACED, *overrides)
    assert pool.run(_train_with_a_slow_disk, 2, *arguments, group=False, timeout=60.0) == [0, 0]
    lines = [event["event"] for event in read_lines(tmp_path / "run" / "events.jsonl")]
    assert lines.index("profile") < lines.index("checkpoint"), "it is in flight when the trace is written"
    (event,) = _events(tmp_path / "run", "profile")
    assert event["ranks"] == 2
    assert [each["step"] for each in _events(tmp_path / "run", "checkpoint")] == [2, 4]


def _train_into_a_nan(recipe: str, *overrides: str) -> list[str]:
    """The warnings of a run whose backward gives a NaN in its second step, and what it raised."""
    from torchtitan_lite.trainable import WholeModel

    usual, told = WholeModel._loss_sum, []

    def without_gradient(self: Any, *args: Any) -> torch.Tensor:
        loss = usual(self, *args)
        return loss + 0.0 * torch.sqrt(loss - loss.detach())

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    kept = Kept(logging.WARNING)
    setup = logging.Logger.setLevel

    def with_kept(self: logging.Logger, level: Any) -> None:  # after the run's own set-up, which replaces handlers
        setup(self, level)
        if self.name == "torchtitan_lite" and kept not in self.handlers:
            self.addHandler(kept)

    with (
        patch.object(WholeModel, "_loss_sum", without_gradient),
        patch.object(logging.Logger, "setLevel", with_kept),
    ):
        try:
            _train(recipe, *overrides)
        except RuntimeError as error:
            told.append(str(error))
    logging.getLogger("torchtitan_lite").removeHandler(kept)
    return told


def test_a_nan_in_the_backward_names_the_forward(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}", "--debug.detect_anomaly=true")
    (told,) = pool.run(_train_into_a_nan, 1, *arguments, group=False)
    assert "debug.detect_anomaly = true looks at every gradient" in told[0]
    (traceback,) = (line for line in told if "Error detected in SqrtBackward0" in line)
    assert "return loss + 0.0 * torch.sqrt(loss - loss.detach())" in traceback
    assert "SqrtBackward0' returned nan" in told[-1]


def test_looking_for_anomalies_changes_no_bit(
    pool: RankPool, recipe: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    on = ("--debug.detect_anomaly=true", "--activation_checkpoint.mode=full", "--training.steps=3")
    assert _numbers(_run(pool, 2, recipe, tmp_path / "run", *on)) == _numbers(plain[:3])


def test_snapshots_of_memory_need_cuda(recipe: Path, tmp_path: Path, pool: RankPool) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    overrides = (f"--job.dump_folder={tmp_path / 'run'}", "--profiling.enable_memory_snapshot=true")
    with pytest.raises(UserError, match="enable_memory_snapshot = true keeps the history of CUDA's allocator"):
        prepare_job(plan_job(recipe, overrides, 1))


def test_what_traces_nothing_is_said(recipe: Path) -> None:
    (warning,) = plan_job(recipe, ["--profiling.enable_profiling=true"], 1).warnings()
    assert "traces nothing: profiling.profile_freq = 10 is past training.steps = 9; lower it" in warning
    assert plan_job(recipe, _TRACED, 1).warnings() == []
