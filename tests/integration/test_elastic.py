"""Nodes that come and go, as launchers on this machine: the run goes on, and its numbers are the undisturbed run's."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.kills import wait_until
from tests.chaos.launched import launch
from tests.checkpoint.reading import events, last_lines
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.observability.sinks import read_lines

pytestmark = pytest.mark.slow

_TIMEOUT_S = 90


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    """Steps that last, so that nodes can come and go in between."""
    return write_recipe(
        tmp_path / "tiny.toml",
        corpus,
        cache,
        model={"spec": "tests.integration.slow_model:SPEC"},
        checkpoint={"enable": True, "interval": 3},
        training={"global_batch_size": 6, "steps": 60},
        lr_scheduler={"total_steps": 60},
        metrics={"log_sample_ids": True},
    )


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A rendezvous that is not part of any node."""
    command = [sys.executable, "-m", "torchtitan_lite", "rendezvous", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"127.0.0.1:{process.stdout.readline().rpartition(':')[2].strip()}"
    process.terminate()
    assert process.wait(10) == 0


def _node(recipe: Path, folder: Path, endpoint: str, name: str, **variables: str) -> "subprocess.Popen[bytes]":
    """One of one or two nodes, each with one rank; its output in a log of its own."""
    settings = {"NPROC": "1", "NNODES": "1:2", "RDZV_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1", **variables}
    settings["RDZV_CONF"] = "keep_alive_interval=1,last_call_timeout=3"  # a test need not wait for slow nodes
    return launch(recipe, folder, log=folder.with_name(f"{name}.log"), **settings)


def _steps(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def _worlds(folder: Path) -> list[int]:
    return [line["world_size"] for line in read_lines(folder / "events.jsonl") if line["event"] == "start"]


def _until(folder: Path, steps: int) -> None:
    assert wait_until(lambda: _steps(folder) >= steps, _TIMEOUT_S), f"at step {_steps(folder)} of {steps}"


def _end_of(nodes: "list[subprocess.Popen[bytes]]", folder: Path) -> list[int]:
    try:
        return [node.wait(_TIMEOUT_S) for node in nodes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"at step {_steps(folder)}: {_logs(folder)}") from None
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()


def _logs(folder: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in sorted(folder.parent.glob("*.log")))


def _require_undisturbed(pool: RankPool, recipe: Path, folder: Path) -> None:
    """The run in `folder` has the losses and samples of one process that nothing disturbs."""
    whole = folder.with_name("whole")
    expected = _run(pool, 1, recipe, whole, "--model.spec=tests.tiny:SPEC")  # the same model, without its waits
    lines = last_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert last_lines(folder / "samples.jsonl") == read_lines(whole / "samples.jsonl")


def _steps_of(folder: Path, name: str) -> list[int]:
    return [event["step"] for event in events(folder, name)]


def test_nodes_are_lost_join_and_leave(pool: RankPool, recipe: Path, tmp_path: Path, endpoint: str) -> None:
    folder = tmp_path / "run"
    first, second = (_node(recipe, folder, endpoint, name) for name in ("first", "second"))
    _until(folder, 5)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait(_TIMEOUT_S)
    assert wait_until(lambda: _worlds(folder) == [2, 1], _TIMEOUT_S), _logs(folder)
    _until(folder, _steps(folder) + 3)
    third = _node(recipe, folder, endpoint, "third")
    assert wait_until(lambda: _worlds(folder) == [2, 1, 2], _TIMEOUT_S), _logs(folder)
    _until(folder, _steps(folder) + 3)
    third.send_signal(signal.SIGTERM)
    assert third.wait(_TIMEOUT_S) == 143
    assert _end_of([first], folder) == [0], _logs(folder)
    assert _worlds(folder) == [2, 1, 2, 1]
    _require_undisturbed(pool, recipe, folder)
    # A node that joins or is told to leave costs no step: the others save before they form anew.
    joined, left = _steps_of(folder, "preemption")
    assert _steps_of(folder, "resume")[1:] == [joined, left]
    ran = [line["step"] for line in read_lines(folder / "samples.jsonl")]
    assert ran[ran.index(joined) + 1 :] == list(range(joined + 1, 61)), "no step was run twice"


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        (
            {"NNODES": "1:3"},
            ["--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2"],
            r"NNODES=1:3: 1 nodes of NPROC=2 do not fit: .*; node counts that fit: 2$",
        ),
        ({"NNODES": "1:2"}, ["--training.global_batch_size=-1"], r"training\.global_batch_size = -1 would follow"),
        ({"NNODES": "1:2"}, ["--checkpoint.load_step=3"], r"checkpoint\.load_step = 3 would go back each time"),
        ({"NNODES": "3:2"}, [], r"NNODES=3:2: expected a whole number of at least 1, or MIN:MAX"),
        ({"NNODES": "1:"}, [], r"NNODES=1:: expected"),
        ({"NNODES": "1:2", "RDZV_ENDPOINT": ""}, [], r"NNODES=1:2 needs RDZV_ENDPOINT=HOST:PORT"),
        ({"NNODES": "1:2", "RDZV_CONF": "join_timeout"}, [], r"RDZV_CONF=join_timeout: expected KEY=VALUE"),
        ({"MAX_RESTARTS": "-1"}, [], r"MAX_RESTARTS=-1: expected a whole number of at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be_elastic_is_refused_before_anything_starts(
    recipe: Path, tmp_path: Path, variables: dict[str, str], overrides: list[str], message: str
) -> None:
    import re

    settings = {"NPROC": "2", "RDZV_ENDPOINT": "127.0.0.1:29500", **variables}
    process = launch(recipe, tmp_path / "run", *overrides, log=tmp_path / "node.log", **settings)
    assert process.wait(_TIMEOUT_S) == 2
    (line,) = (tmp_path / "node.log").read_text().splitlines()
    assert re.search(message, line), line
