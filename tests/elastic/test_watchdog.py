"""Hangs end, and are told in plain words; what is slow and no hang goes on."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.checkpoint.reading import last_lines
from tests.ranks import RankPool
from tests.test_trainer import _train
from tests.tiny import write_recipe
from torchtitan_lite.observability.sinks import read_lines

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/elastic/hanging.py"
HANGS = ["loader", "stopped", "parted"]


def _recipe(folder: Path, corpus: Path, cache: Path, **sections: dict[str, object]) -> Path:
    comm: dict[str, object] = {"train_timeout_seconds": 2}
    training: dict[str, object] = {"steps": 6, **sections.pop("training", {})}
    return write_recipe(folder / "tiny.toml", corpus, cache, comm=comm, training=training, **sections)


@dataclass(frozen=True)
class Chain:
    """A run that torchrun started again after each hang. reports: the lines on stderr, in order."""

    folder: Path
    code: int
    reports: list[str]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    recipe = _recipe(folder, corpus, cache, checkpoint={"enable": True, "interval": 3})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = [f"--max-restarts={len(HANGS)}", "--monitor-interval=0.1", "--shutdown-timeout=3"]
    command = [*torchrun, *settings, SCRIPT, ",".join(HANGS)]
    done = _finished([*command, str(recipe)], 150)
    reports = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return Chain(folder / "run", done.returncode, reports, read_lines(folder / "run" / "events.jsonl"))


def _finished(command: list[str], timeout: float) -> "subprocess.CompletedProcess[str]":
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    environment = {**keep, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


TOLD = {
    "loader": r"Rank 0 waits in all_reduce \(valid_counts, torchtitan_lite/trainable.py:\d+\); rank 1 did not arrive: "
    r"it has been loading data for \d s \(_sleep, tests/elastic/hanging.py:\d+, host \S+\). This is a stall of the "
    r"data loader, not of communication\.",
    "stopped": r"Rank 0 waits in \S+ \(.*\); rank 1 did not arrive: nothing was heard of it for \d s, last in "
    r'"[a-z ]+" of step \d \(host \S+\)\. A process that is silent is stopped or lost',
    "parted": r"No rank is missing, but they are in different collectives: rank 0 waits in all_reduce "
    r"\(_sum_over_shards, torchtitan_lite/optim/gradients.py:\d+\); rank 1 waits in barrier \(<lambda>, ",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", HANGS)
def test_a_hang_is_told_once_in_words(chain: Chain, way: str) -> None:
    assert len(chain.reports) == len(HANGS), chain.reports
    line = chain.reports[HANGS.index(way)]
    assert re.match(r"error: step \d has hung for \d s \(comm.train_timeout_seconds = 2\)\. ", line)
    assert re.search(TOLD[way], line), line


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_is_finished(chain: Chain) -> None:
    assert chain.code == 0
    assert [line["step"] for line in last_lines(chain.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in chain.events if event["event"] == "end"] == [6]


@pytest.mark.slow
def test_a_hang_leaves_an_event_and_stacks(chain: Chain) -> None:
    stalls = [event for event in chain.events if event["event"] == "stall"]
    assert [event["report"] for event in stalls] == chain.reports
    assert [event["attempt"] for event in stalls] == [1, 2, 3]
    phases = [[account["phase"] for account in event["ranks"]] for event in stalls]
    assert phases[0] == ["forward and backward", "loading data"]
    folder = chain.folder / "comm_traces" / f"step-{stalls[0]['step']}"
    assert "Stacks: " + str(folder) in chain.reports[0]
    # The last start's, which hung at the same step.
    assert "in barrier" in (folder / "rank-1.txt").read_text()
    recorded = json.loads((folder / "collectives_rank_0.json").read_text())
    assert [entry["retired"] for entry in recorded["entries"]][-1] is False


@pytest.mark.slow
def test_one_process_is_watched_alone_and_may_be_suspended(tmp_path: Path, corpus: Path, cache: Path) -> None:
    recipe = str(_recipe(tmp_path, corpus, cache))
    done = _finished([sys.executable, SCRIPT, "suspended", recipe, "--comm.train_timeout_seconds=3"], 60)
    assert done.returncode == 1
    assert "went on" in done.stdout
    assert re.search(
        r"^error: step 3 has hung for \d+ s \(comm.train_timeout_seconds = 3\)\. Rank 0 has been loading data for "
        r"\d+ s \(_suspended, tests/elastic/hanging.py:\d+, host \S+\)\. Stacks: ",
        done.stderr,
        re.MULTILINE,
    ), done.stderr


@contextmanager
def _slowed(owner: Any, name: str, seconds: float) -> Iterator[None]:
    usual = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return usual(*args, **kwargs)

    with patch.object(owner, name, slow):
        yield


def _train_slowly(what: str, recipe: str, *overrides: str) -> int:
    from torchtitan_lite.checkpoint import saver
    from torchtitan_lite.trainable import WholeModel

    owner, name, seconds = {
        "save": (saver, "write_parts", 3.0),
        "micro-batches": (WholeModel, "_loss_sum", 0.5),
    }[what]
    with _slowed(owner, name, seconds):
        return _train(recipe, *overrides)


@pytest.mark.parametrize("what", ["save", "micro-batches"])
def test_what_is_slow_and_no_hang_goes_on(what: str, tmp_path: Path, corpus: Path, cache: Path, pool: RankPool) -> None:
    sections: dict[str, dict[str, object]] = {
        "save": {"checkpoint": {"enable": True, "interval": 2}, "training": {"steps": 2}},
        # A step of 6 micro-batches takes longer than the 2 s without a beat that it may.
        "micro-batches": {"training": {"steps": 2, "global_batch_size": 12, "local_batch_size": 1}},
    }[what]
    recipe = _recipe(tmp_path, corpus, cache, **sections)
    assert pool.run(_train_slowly, 2, what, str(recipe), group=False) == [0, 0]
    assert [line["event"] for line in read_lines(tmp_path / "run" / "events.jsonl")][-1] == "end"
