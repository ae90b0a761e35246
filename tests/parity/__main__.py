"""`make parity`: every case against the single process, as a table that goes into docs/parallelism.md."""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.corpus import write_corpus
from tests.parity.cases import BFLOAT16, CASES, FLOAT8, FLOAT8_EXPERTS, THOROUGH
from tests.parity.report import write_section
from tests.parity.runner import (
    BF16_LIMITS,
    F8_LIMITS,
    GROUPED_LIMITS,
    LIMITS,
    STEPS,
    Alone,
    Case,
    Difference,
    base_recipe,
    compare,
    exceeded,
    limits_of,
    run_case,
)
from tests.ranks import RankPool

_COLUMNS = ("choices", "ties", "balance", "loss", "norm", "grad", "losses", "validation")
_HEADINGS = (
    "other choices",
    "ties",
    "balance",
    "first loss",
    "first norm",
    "worst gradient",
    f"{STEPS} losses",
    "validation",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name or model has this text in it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[tuple[Case, Difference]] = []
    failures = 0
    every = [*CASES, *THOROUGH, *BFLOAT16, *FLOAT8, *FLOAT8_EXPERTS]
    cases = [case for case in every if options.only in f"{case.model} {case.name}"]
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        recipe = base_recipe(folder, parity_corpus(folder), folder / "cache")
        pool = RankPool(8)
        alone = Alone(pool, recipe)
        try:
            for case in cases:
                started = time.perf_counter()
                limits = limits_of(case)
                difference = compare(run_case(pool, recipe, case), alone.of(case))
                rows.append((case, difference))
                beyond = exceeded(difference, limits)
                failures += bool(beyond)
                numbers = "  ".join(f"{_shown(getattr(difference, column)):>7}" for column in _COLUMNS)
                verdict = f"FAIL {beyond}, {difference.grad_name}" if beyond else "ok"
                seconds = time.perf_counter() - started
                print(
                    f"{case.model:<18} {case.ranks} ranks  {case.name:<58} {numbers}  {seconds:5.1f} s  {verdict}",
                    flush=True,
                )
        finally:
            pool.close()
    if not options.only:
        _write(rows)
    print(f"{len(rows)} meshes, {failures} beyond the limits")
    return 1 if failures else 0


def parity_corpus(folder: Path) -> Path:
    """Documents shorter than a sample, so that every sample has ends of documents in it."""
    (folder / "corpus").mkdir()
    (folder / "cache").mkdir()
    return write_corpus(folder / "corpus", documents=200, sentences=6)


def _write(rows: list[tuple[Case, Difference]]) -> None:
    lines = [
        f"| model | ranks | mesh | {' | '.join(_HEADINGS)} |",
        f"|---|---|---|{'---|' * len(_HEADINGS)}",
    ]
    for case, difference in rows:
        numbers = " | ".join(_shown(getattr(difference, column)) for column in _COLUMNS)
        lines.append(f"| {case.model.replace('/', ', ').lower()} | {case.ranks} | {case.name} | {numbers} |")
    lines.append("| **limit in float32** | | | " + " | ".join(_shown(LIMITS[column]) for column in _COLUMNS) + " |")
    lines.append(
        "| **limit in bfloat16** | | | " + " | ".join(_shown(BF16_LIMITS[column]) for column in _COLUMNS) + " |"
    )
    lines.append("| **limit in float8** | | | " + " | ".join(_shown(F8_LIMITS[column]) for column in _COLUMNS) + " |")
    lines.append(
        "| **limit, experts in float8** | | | "
        + " | ".join(_shown(GROUPED_LIMITS[column]) for column in _COLUMNS)
        + " |"
    )
    write_section("parity", lines)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
