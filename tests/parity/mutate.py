"""`make mutants`: the parity suite must catch every bug of mutants.py; the table goes into docs/parallelism.md."""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.parity import memory_mutants, moe_mutants, mutants  # noqa: F401, each registers its own
from tests.parity.__main__ import parity_corpus
from tests.parity.mutant import MUTANTS, Mutant
from tests.parity.report import write_section
from tests.parity.runner import Alone, base_recipe, compare, exceeded, run_case
from tests.ranks import RankError, RankPool

_STEPS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name or bug has this text in it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    chosen = [m for m in MUTANTS if options.only in f"{m.apply.__name__} {m.bug}"]
    lines = ["| bug | mesh | model | caught by |", "|---|---|---|---|"]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        recipe = base_recipe(folder, parity_corpus(folder), folder / "cache")
        pool = RankPool(8)
        alone = Alone(pool, recipe, _STEPS)
        try:
            for mutant in chosen:
                caught = caught_by(alone, mutant)
                missed += not caught
                print(
                    f"{'caught' if caught else 'MISSED'}  {mutant.bug:<88} {mutant.case.name:<40} {caught}", flush=True
                )
                case = mutant.case
                lines.append(f"| {mutant.bug} | {case.ranks} ranks: {case.name} | {case.model.lower()} | {caught} |")
        finally:
            pool.close()
    if not options.only:
        write_section("mutants", lines)
    print(f"{len(chosen)} bugs, {missed} missed")
    return 1 if missed else 0


def caught_by(alone: Alone, mutant: Mutant) -> str:
    """What of the comparison shows the bug; empty where nothing does. The right product must pass on that mesh."""
    expected = alone.of(mutant.case)
    if beyond := exceeded(compare(run_case(alone.pool, alone.recipe, mutant.case, alone.steps), expected)):
        raise AssertionError(f"{mutant.case}: fails without the bug: {beyond}")
    try:
        found = run_case(alone.pool, alone.recipe, mutant.case, alone.steps, mutant.apply)
    except RankError:
        raise  # a bug that cannot run proves nothing
    except AssertionError as error:
        return str(error).partition(": ")[2].partition("\n")[0]
    difference = compare(found, expected)
    return ", ".join(f"{name} {value:.0e}" for name, value in exceeded(difference).items())


if __name__ == "__main__":
    sys.exit(main())
