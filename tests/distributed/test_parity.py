"""Meshes of up to four ranks (up to --max-ranks) against the single process, and bugs that the comparison must catch.

All of them, with their numbers: `make parity` and `make mutants`.
"""

import warnings

import pytest

from tests.parity import memory_mutants, moe_mutants, mutants  # noqa: F401, each registers its own
from tests.parity.__main__ import parity_corpus
from tests.parity.cases import BFLOAT16, CASES, EXPERTS, FLOAT8, FLOAT8_EXPERTS
from tests.parity.mutant import MUTANTS, Mutant
from tests.parity.mutate import caught_by
from tests.parity.runner import Alone, Case, base_recipe, compare, exceeded, limits_of, run_case
from tests.ranks import RankPool

_STEPS = 2  # and a validation after them: a difference feeds back through clipping and the optimizer


@pytest.fixture(scope="module")
def alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("parity")
    return Alone(pool, base_recipe(folder, parity_corpus(folder), folder / "cache"), _STEPS)


def _ids(case: Case) -> str:
    return f"{case.ranks} ranks, {case.name}, {case.model}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.ranks(case.ranks))
        for case in [*CASES, *BFLOAT16[:3], FLOAT8[0], *FLOAT8_EXPERTS[:4]]
    ],
    ids=_ids,
)
def test_a_mesh_computes_what_one_process_does(alone: Alone, case: Case) -> None:
    found = run_case(alone.pool, alone.recipe, case, _STEPS)
    difference = compare(found, alone.of(case))
    if difference.ties:
        warnings.warn(f"{case}: {difference.ties} ties between experts fell the other way", stacklevel=1)
    assert not exceeded(difference, limits_of(case)), difference


# One of each kind here; all of them in `make mutants`.
_KINDS = (
    "loss_divided_twice",
    "no_reduction_over_cp",
    "validation_counts_padding",
    "expert_gradients_divided",
    "balance_over_ranks",
    "recomputed_from_another_input",
)


@pytest.mark.parametrize("name", _KINDS)
def test_the_comparison_catches_a_bug(alone: Alone, name: str) -> None:
    assert caught_by(alone, mutant_named(name))


def mutant_named(name: str) -> Mutant:
    (found,) = [mutant for mutant in MUTANTS if mutant.apply.__name__ == name]
    return found


def test_every_technique_and_both_models_are_held_to_one_process() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in EXPERTS if case.ranks > 1}) >= 15
    assert {case.model.split("/")[0] for case in CASES} >= {"DEEP_LLAMA", "DEEP_QWEN", "SMALL_GPT"}
    assert {case.ranks for case in CASES} >= {2, 3, 4, 8}
    assert len(MUTANTS) >= 25
