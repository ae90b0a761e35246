"""The cut into stages, their places, and how many micro-batches a schedule takes."""

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_lite.config.schema import Parallelism
from torchtitan_lite.distributed.pipeline_plan import (
    PipelinePlan,
    microbatches_needed,
    plan_pipeline,
    split_by_cost,
)
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.llama3.args import FLAVORS

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def _flops(layers: int, layer: float = 10.0, output: float = 7.0) -> dict[str, float]:
    names = {f"layers.{index}": layer + index % 3 for index in range(layers)}
    return {"tok_embeddings": 0.0, **names, "norm": 0.5, "output": output}


def _parallelism(degree: int = 2, schedule: Any = "1F1B", **keys: Any) -> Parallelism:
    return Parallelism(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule, **keys)


def _plan(layers: int = 8, samples: int = 8, **keys: Any) -> PipelinePlan:
    return plan_pipeline(_parallelism(**keys), _flops(layers), samples)


def _costs(flops: dict[str, float], sizes: list[int]) -> list[float]:
    layers = [cost for name, cost in flops.items() if "." in name]
    costs, start = [], 0
    for size in sizes:
        costs.append(sum(layers[start : start + size]))
        start += size
    costs[-1] += flops["norm"] + flops["output"]
    return costs


def _cuts(layers: int, stages: int) -> list[list[int]]:
    """Layers of each stage, in every way there is."""
    return [
        [end - start for start, end in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), stages - 1)
    ]


@pytest.mark.parametrize("output", [0.0, 7.0, 45.0])
@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (5, 1), (5, 5), (6, 2), (7, 3), (9, 4), (10, 8)])
def test_no_cut_has_a_cheaper_most_costly_stage(layers: int, stages: int, output: float) -> None:
    flops = _flops(layers, output=output)
    sizes = split_by_cost(flops, stages)
    assert sum(sizes) == layers
    assert min(sizes) >= 1
    every = _cuts(layers, stages)

    def key(cut: list[int]) -> tuple[float, float]:
        costs = _costs(flops, cut)
        return max(costs), sum(cost * cost for cost in costs)

    assert key(sizes) == pytest.approx(min(map(key, every)))


# Of the last ones, the cut with the smallest squares of all has a dearer most costly stage.
@pytest.mark.parametrize("seed", [*range(20), 130, 150, 171])
def test_no_cut_of_layers_of_any_cost_has_a_cheaper_most_costly_stage(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(2, 9)
    stages = draw.randint(1, layers)
    costs = {f"layers.{index}": float(draw.randint(1, 20)) for index in range(layers)}
    flops = {"tok_embeddings": 0.0, **costs, "norm": 1.0, "output": float(draw.randint(0, 30))}
    found = split_by_cost(flops, stages)
    assert (sum(found), len(found)) == (layers, stages)
    assert min(found) >= 1

    def key(cut: list[int]) -> tuple[float, float]:
        costs = _costs(flops, cut)
        return max(costs), sum(cost * cost for cost in costs)

    assert key(found) == min(map(key, _cuts(layers, stages)))


def test_a_heavy_output_matrix_gets_fewer_layers_beside_it() -> None:
    # Llama 3 8B's weighs as much as two layers.
    assert split_by_cost(FLAVORS["8B"].flops_by_module(8192), 4) == [8, 9, 9, 6]
    assert split_by_cost(FLAVORS["405B"].flops_by_module(8192), 16)[-1] == 7


def test_what_stands_around_the_layers_joins_first_and_last_stage() -> None:
    stages = _plan(layers=4).stages
    assert [name for stage in stages for name in stage] == list(_flops(4))
    assert stages[0][0] == "tok_embeddings"
    assert stages[-1][-2:] == ("norm", "output")


def test_layers_per_stage_are_taken_as_they_are() -> None:
    plan = _plan(layers=7, schedule="Interleaved1F1B", pipeline_parallel_layers_per_stage=2)
    assert [sum("." in name for name in stage) for stage in plan.stages] == [2, 2, 2, 1]
    with pytest.raises(UserError, match=r"3 stages on .*degree = 2: Interleaved1F1B runs 2 stages or more.*fit: 1, or"):
        _plan(layers=6, schedule="Interleaved1F1B", pipeline_parallel_layers_per_stage=2)
    _plan(layers=6, schedule="Interleaved1F1B", pipeline_parallel_layers_per_stage=1)


_PARTS = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]


def test_stages_by_name() -> None:
    assert _plan(layers=2, module_fqns_per_model_part=_PARTS).stages == tuple(map(tuple, _PARTS))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [["tok_embedings", "layers.0"], _PARTS[1]],
            r"\[0\]: the model has no module tok_embedings; did you mean tok_",
        ),
        ([_PARTS[0], ["layers.1", "norm"]], "output is in no stage"),
        ([_PARTS[0], ["layers.0", *_PARTS[1]]], r"layers\.0 stands where the model has layers\.1"),
        ([["layers.0", "tok_embeddings"], _PARTS[1]], "layers.0 stands where the model has tok_embeddings"),
        ([[*_PARTS[0], *_PARTS[1]], []], r"\[1\]: is empty"),
        ([*_PARTS, ["output"]], "output stands where the model has nothing more"),
        ([[name] for part in _PARTS for name in part], "5 stages on .*: 1F1B runs 1 stage on every rank"),
    ],
)
def test_names_that_do_not_make_stages_are_refused(parts: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _plan(layers=2, module_fqns_per_model_part=parts)


def test_stages_lie_in_rounds_or_in_a_v() -> None:
    assert _plan(degree=4).rank_of_stage == (0, 1, 2, 3)
    assert _plan(schedule="LoopedBFS").rank_of_stage == (0, 1, 0, 1)
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        plan = _plan(degree=4, schedule=schedule)
        assert plan.rank_of_stage == (0, 1, 2, 3, 3, 2, 1, 0)
        assert plan.stages_of(1) == [1, 6]


@pytest.mark.parametrize(("schedule", "largest"), [("GPipe", 6), ("Interleaved1F1B", 3)])
def test_more_stages_than_layers_name_the_largest_degree_that_works(schedule: str, largest: int) -> None:
    with pytest.raises(UserError, match=rf"of 6 layers.*use a degree of {largest} or less"):
        _plan(layers=6, degree=largest + 1, schedule=schedule)
    _plan(layers=6, degree=largest, schedule=schedule)


def test_empty_micro_batches_and_what_they_cost() -> None:
    plan = _plan(degree=4, samples=3)
    assert (plan.microbatches, plan.padding) == (4, 1)
    assert plan.bubble() == pytest.approx(1 - 3 / (4 + 3))
    assert _plan(degree=4, samples=12).bubble() == pytest.approx(3 / 15)
    # One micro-batch keeps one rank busy, whatever the schedule.
    assert _plan(degree=2, samples=1, schedule="ZBVZeroBubble").bubble() == 0.5
    # Two stages a rank halve the time to fill.
    assert _plan(degree=2, samples=4, schedule="Interleaved1F1B").bubble() == pytest.approx(0.5 / 4.5)
    # Backwards in halves fill two thirds of what is left.
    for schedule in ("ZBVZeroBubble", "InterleavedZeroBubble"):
        assert _plan(degree=4, samples=8, schedule=schedule).bubble() == pytest.approx(0.5 / 8.5)


def test_micro_batches_are_no_larger_than_what_there_is_to_put_in() -> None:
    for samples, asked, microbatches, size in ((5, 2, 3, 2), (2, 64, 1, 2), (8, 5, 2, 4), (7, 3, 3, 3)):
        plan = _plan(samples=samples, schedule="GPipe", pipeline_parallel_microbatch_size=asked)
        assert (plan.microbatches, plan.microbatch_size) == (microbatches, size)


def _accepts(schedule: str, count: int, ranks: int) -> bool:
    """Whether torch's schedule takes that many micro-batches, on every rank."""
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    plan = _plan(layers=16, degree=ranks, schedule=schedule)
    cls = get_schedule_class(schedule)
    for rank in range(ranks):
        stages = [
            SimpleNamespace(
                num_stages=len(plan.stages), group_size=ranks, group_rank=rank, stage_index=index, submod=None
            )
            for index in plan.stages_of(rank)
        ]
        try:
            made = cls(stages[0] if issubclass(cls, PipelineScheduleSingle) else stages, count, loss_fn=len)  # type: ignore[call-overload]
        except (ValueError, AssertionError, RuntimeError):
            return False
        placement = getattr(made, "stage_index_to_group_rank", None)
        assert placement is None or tuple(placement[index] for index in range(len(plan.stages))) == plan.rank_of_stage
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_torch_takes_the_micro_batches_and_no_fewer_would_do(schedule: str, ranks: int) -> None:
    stages = ranks if schedule in ("1F1B", "GPipe") else 2 * ranks
    for samples in range(1, 14):
        needed = microbatches_needed(schedule, samples, ranks, stages)
        assert needed >= samples
        assert _accepts(schedule, needed, ranks), (samples, needed)
        assert not any(_accepts(schedule, fewer, ranks) for fewer in range(samples, needed)), (samples, needed)


GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
HALVES = "0F0,0I0,0W0\n1F0,1I0,1W0\n"


@pytest.fixture
def from_file(tmp_path: Path) -> Any:
    def plan(text: str, samples: int = 2, **keys: Any) -> PipelinePlan:
        path = tmp_path / "schedule.csv"
        path.write_text(text)
        named = _parallelism(schedule="PipelineScheduleMulti", pipeline_parallel_schedule_csv=str(path), **keys)
        return plan_pipeline(named, _flops(4), samples)

    return plan


def test_a_schedule_from_a_file(from_file: Any) -> None:
    plan = from_file(GOOD)
    assert (plan.microbatches, plan.padding, plan.rank_of_stage, plan.split_backward) == (2, 0, (0, 1), False)
    assert from_file(HALVES, samples=1).split_backward
    assert from_file(GOOD + "\n\n") == plan
    assert from_file(GOOD, samples=1).padding == 1
    assert from_file("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n", samples=1).rank_of_stage == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD * 2, "has 4 lines, parallelism.pipeline_parallel_degree is 2"),
        ("0F0,0B0\n1F0,1X0\n", "line 2: 1X0: expected an action"),
        ("0F0,0B0,1F0\n1B0\n", "stage 1 is on line 1 and on line 2"),
        ("0F0,0B0\n1F0\n", "stage 1 has F for micro-batch 0, expected F and then B"),
        ("0B0,0F0\n1F0,1B0\n", "stage 0 has BF for micro-batch 0"),
        ("0F0,0B0,1F0,1B0\n,\n", "line 2 has no actions; every rank needs a stage"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "line 1 waits for ever at 0B0"),
        ("0F0,0B0\n1F0\n1B0\n", "has 3 lines"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "waits for ever"),
    ],
)
def test_files_that_are_no_schedule_are_refused(from_file: Any, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_file(text, samples=1)


def test_a_file_that_is_not_there_or_too_short_is_refused(from_file: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere.csv: No such file"):
        _plan(schedule="PipelineScheduleMulti", pipeline_parallel_schedule_csv="nowhere.csv")
    with pytest.raises(UserError, match="has 2 micro-batches, a step has 5 of 1 samples"):
        from_file(GOOD, samples=5)
    with pytest.raises(UserError, match="has 2 stages, the recipe cuts the model into 4"):
        from_file(GOOD, pipeline_parallel_layers_per_stage=1)


def test_the_plan_says_itself() -> None:
    text = str(replace(_plan(samples=1), padding=1))
    assert text == "1F1B, 2 stages with 4 4 layers, 2 micro-batches (1 of them empty), 67% bubble at least"
