"""`make chaos`: kills, damage, full disks, cut links; its tables go into docs/checkpoints.md and docs/elastic.md."""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.chaos import disks, launched, two_hosts
from tests.chaos.damages import undetected
from tests.chaos.kills import Tally, campaign, draw, recipe_of
from tests.parity.report import write_section
from tests.ranks import RankPool
from tests.test_trainer import _run as train
from torchtitan_lite.checkpoint import storage

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
_KILLS, _LAUNCHED, _DAMAGES, _A_RUN = 160, 42, 320, 8

Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part; docs are left as they are")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of moments and damages")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    _silence_ranks()
    found: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        pool = RankPool(4)
        try:
            for part in [options.only] if options.only else PARTS:
                started = time.perf_counter()
                folder = Path(name) / part
                folder.mkdir()
                rows = PARTS[part](pool, folder, options.seed)
                found[part] = [{**row, "minutes": (time.perf_counter() - started) / 60} for row in rows]
                print("\n".join(_table(found[part])), flush=True)
        finally:
            pool.close()
    failures = [fault for rows in found.values() for row in rows for fault in row["faults"]]
    print("\n".join(failures) if failures else "nothing lost, nothing bad loaded", flush=True)
    if not options.only:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        write_section("chaos", _table(found["damages"] + found["disks"]), "checkpoints.md")
        write_section("chaos", _table(found["kills"] + found["launched"] + found["hosts"]), "elastic.md")
    return 1 if failures else 0


def _silence_ranks() -> None:
    """What ranks print goes nowhere; what this process prints goes where it did."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for name in ("stdout", "stderr"):
        number = getattr(sys, name).fileno()
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
        os.dup2(nowhere, number)


def _damages(pool: RankPool, folder: Path, seed: int) -> Rows:
    train(pool, 3, recipe_of(folder, 4), folder / "run")
    older, good = (storage.step_folder(folder / "run" / "checkpoint", step) for step in (2, 4))
    done, missed = undetected(good, older, folder, _DAMAGES, seed)
    return [
        {"what": kind, "times": times, "outcome": "all found", "faults": [line for line in missed if kind in line]}
        for kind, times in done.items()
    ]


def _kills(pool: RankPool, folder: Path, seed: int) -> Rows:
    recipe, total, choose = recipe_of(folder, 60), Tally(), random.Random(seed)
    train(pool, 1, recipe, folder / "undisturbed")
    run, bar = 0, tqdm(total=_KILLS, desc="kills in the pool of ranks")
    while total.kills < _KILLS:
        run += 1
        _add(total, campaign(pool, draw(_A_RUN, choose), recipe, folder / f"run-{run}", folder / "undisturbed"))
        bar.update(total.kills - bar.n)
    bar.close()
    return [_row("ranks killed: one or all, in mid-step, save, rename, prune, load or at any moment", run, total)]


def _launched(pool: RankPool, folder: Path, seed: int) -> Rows:
    recipe, total = recipe_of(folder, 300), Tally()
    train(pool, 1, recipe, folder / "undisturbed")
    run, bar = 0, tqdm(total=_LAUNCHED, desc="kills under torchrun")
    while total.kills < _LAUNCHED:
        run += 1
        _add(total, launched.campaign(6, recipe, folder / f"run-{run}", folder / "undisturbed", seed + run))
        bar.update(total.kills - bar.n)
    bar.close()
    return [_row("under torchrun: a worker, all workers or the agent killed", run, total)]


def _add(total: Tally, tally: Tally) -> None:
    for name in ("kills", "resumed", "repeated_steps", "left_overs"):
        setattr(total, name, getattr(total, name) + getattr(tally, name))
    total.faults += tally.faults


def _row(what: str, runs: int, tally: Tally) -> dict[str, Any]:
    outcome = (
        f"{runs} runs end with the undisturbed one's losses and samples; {tally.resumed} resumes from the latest "
        f"checkpoint, {tally.repeated_steps} steps run twice, {tally.left_overs} half-written folders removed"
    )
    return {"what": what, "times": tally.kills, "outcome": outcome, "faults": tally.faults}


def _disks(pool: RankPool, folder: Path, seed: int) -> Rows:
    recipe = recipe_of(folder, 120)
    train(pool, 2, recipe, folder / "undisturbed")
    endless = folder / "endless.toml"
    endless.write_text(recipe.read_text().replace("steps = 120", "steps = 100000"))
    scenarios: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "disk of the checkpoints full for a while": (
            "training goes on, the save is tried again, older checkpoints are good",
            lambda: disks.full_checkpoint_disk(pool, recipe, folder / "full", folder / "undisturbed"),
        ),
        "checkpoints read only for a while": (
            "training goes on, the save is tried again, older checkpoints are good",
            lambda: disks.read_only_checkpoints(pool, recipe, folder / "read-only", folder / "undisturbed"),
        ),
        "disk of the whole run folder full": (
            "the run stops with a line that says so, older checkpoints are good",
            lambda: disks.full_run_disk(endless, folder / "all-full"),
        ),
    }
    rows: Rows = []
    for what, (outcome, scenario) in scenarios.items():
        try:
            rows.append({"what": what, "times": 1, "outcome": outcome, "faults": scenario()})
        except disks.CannotMount as reason:
            rows.append({"what": what, "times": 0, "outcome": f"not run: {reason}", "faults": []})
    return rows


PARTS: dict[str, Callable[[RankPool, Path, int], Rows]] = {
    "damages": _damages,
    "kills": _kills,
    "launched": _launched,
    "disks": _disks,
    "hosts": two_hosts.rows,
}


def _table(rows: Rows) -> list[str]:
    lines = ["| what | times | outcome |", "| --- | ---: | --- |"]
    for row in rows:
        outcome = f"**{len(row['faults'])} faults**" if row["faults"] else row["outcome"]
        lines.append(f"| {row['what']} | {row['times']} | {outcome} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
