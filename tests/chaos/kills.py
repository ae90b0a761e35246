"""Ranks killed in mid-step, mid-save, mid-rename and mid-load; after each kill the latest checkpoint must be good."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.checkpoint.reading import last_lines
from tests.corpus import write_corpus
from tests.ranks import RankError, RankPool
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.observability.sinks import read_lines

# Where a rank kills itself. The rest of the kills come from outside, at any moment.
MOMENTS = ("step", "write", "manifest", "rename", "prune", "load", "verify")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. moment: where a rank is when it comes, or "any". after: times that it is there before, or seconds.
    whom: "one" rank or "all" of them."""

    moment: str
    after: float
    whom: str
    rank: int
    ranks: int
    async_mode: str


def recipe_of(folder: Path, steps: int, model: str = "tests.tiny:SPEC") -> Path:
    """A run with a checkpoint every other step, in which nothing changes with the number of ranks."""
    corpus = folder / "corpus"
    corpus.mkdir()
    return write_recipe(
        folder / "tiny.toml",
        write_corpus(corpus),
        folder / "cache",
        model={"spec": model},
        checkpoint={"enable": True, "interval": 2, "keep_latest_k": 3},
        training={"global_batch_size": 7, "steps": steps},
        lr_scheduler={"total_steps": -1},
        metrics={"log_sample_ids": True},
    )


def draw(count: int, choose: random.Random) -> list[Kill]:
    """Kills: half at chosen moments, half at any."""
    found = []
    for index in range(count):
        ranks = choose.choice((1, 2, 3, 4))
        moment = MOMENTS[index // 2 % len(MOMENTS)] if index % 2 else "any"
        after = choose.uniform(0.05, 2.5) if moment == "any" else choose.randint(0, 3)
        if moment in ("load", "verify"):
            after = 0
        # What the first rank alone does: no other could be killed there.
        rank = 0 if moment in ("manifest", "rename", "prune") else choose.randrange(ranks)
        whom = choose.choice(("one", "one", "all")) if moment == "any" else "one"
        mode = choose.choice(("disabled", "async", "async_with_pinned_mem"))
        found.append(Kill(moment, after, whom, rank, ranks, mode))
    return found


@contextmanager
def _killed_at(moment: str, after: int) -> Iterator[None]:
    from torchtitan_lite.checkpoint import manager, shards
    from torchtitan_lite.trainer import Trainer

    owner: Any
    owner, name = {
        "step": (Trainer, "_agree"),
        "write": (shards, "hasher"),
        "manifest": (storage, "_canonical"),
        "rename": (storage, "sync"),
        "prune": (storage.shutil, "rmtree"),
        "load": (shards.Stored, "read_into"),
        "verify": (manager, "_require_intact"),
    }[moment]
    usual, calls = getattr(owner, name), iter(range(1_000_000))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*args, **kwargs)

    with patch.object(owner, name, killed):
        yield


def _train_under_fire(kill: Kill | None, recipe: str, *overrides: str) -> int:
    from contextlib import nullcontext

    from tests.test_trainer import _train

    aimed = kill is not None and kill.moment != "any" and int(os.environ["RANK"]) == kill.rank
    with _killed_at(kill.moment, int(kill.after)) if kill is not None and aimed else nullcontext():
        return _train(recipe, *overrides)


def _kill_later(pool: RankPool, kill: Kill) -> threading.Timer:
    def strike() -> None:
        workers = [pool._workers[rank] for rank in (range(kill.ranks) if kill.whom == "all" else [kill.rank])]
        for worker in workers:
            worker.process.kill()

    timer = threading.Timer(kill.after, strike)
    timer.daemon = True
    return timer


@dataclass
class Tally:
    """What came of a campaign. faults: what is wrong, none where all held."""

    kills: int = 0
    resumed: int = 0
    repeated_steps: int = 0
    left_overs: int = 0
    faults: list[str] = field(default_factory=list)


def campaign(
    pool: RankPool, kills: list[Kill], recipe: Path, folder: Path, undisturbed: Path, *overrides: str
) -> Tally:
    """Start a run again and again, killing it each time, then let it finish and compare it with an undisturbed one."""
    tally = Tally()
    for kill in [*kills, None]:
        steps = storage.published_steps(folder / "checkpoint")
        ranks = 2 if kill is None else kill.ranks
        mode = "disabled" if kill is None else kill.async_mode
        arguments = (str(recipe), f"--job.dump_folder={folder}", f"--checkpoint.async_mode={mode}", *overrides)
        died = _run(pool, kill, ranks, arguments)
        tally.kills += died
        attempt = [line for line in read_lines(folder / "events.jsonl") if line["event"] == "resume"]
        if steps and attempt and attempt[-1]["step"] == steps[-1]:
            tally.resumed += 1
        tally.faults += [f"{kill}: {line}" for line in is_bad(folder)]
    return compared(tally, folder, undisturbed)


def _run(pool: RankPool, kill: Kill | None, ranks: int, arguments: tuple[str, ...]) -> bool:
    """Whether a rank was killed: a run may be over before."""
    pool._start(ranks)
    timer = _kill_later(pool, kill) if kill is not None and kill.moment == "any" else None
    if timer is not None:
        timer.start()
    try:
        pool.run(_train_under_fire, ranks, kill, *arguments, group=False, timeout=90.0)
    except RankError as error:
        if "hang" in str(error):
            raise
        return True
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()
    return False


def is_bad(folder: Path) -> list[str]:
    """What is wrong with the checkpoints there are, each of which must be good."""
    steps = storage.published_steps(folder / "checkpoint")
    return [line for step in steps for line in storage.verified(storage.step_folder(folder / "checkpoint", step))]


def compared(tally: Tally, folder: Path, undisturbed: Path) -> Tally:
    events = read_lines(folder / "events.jsonl")
    tally.faults += [f"bad: {event['why']}" for event in events if event["event"] == "bad checkpoint"]
    tally.left_overs = sum(event["event"] == "left over" for event in events)
    tally.repeated_steps = len(read_lines(folder / "metrics.jsonl")) - len(last_lines(folder / "metrics.jsonl"))
    if last_lines(folder / "samples.jsonl") != last_lines(undisturbed / "samples.jsonl"):
        tally.faults.append("other samples than the undisturbed run")
    found, whole = (last_lines(run / "metrics.jsonl") for run in (folder, undisturbed))
    if len(found) != len(whole):
        tally.faults.append(f"ended at step {len(found)} of {len(whole)}")
    for line, expected in zip(found, whole, strict=False):
        if line["step"] != expected["step"] or abs(line["loss"] - expected["loss"]) > 1e-5:
            tally.faults.append(f"step {line['step']}: loss {line['loss']} for {expected['loss']}")
    return tally


def wait_until(done: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.05)
    return False
