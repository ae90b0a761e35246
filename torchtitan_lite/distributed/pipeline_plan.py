"""How a model is cut into pipeline stages, where they lie, and how many micro-batches a schedule takes. No torch."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torchtitan_lite.config.decoding import nearest
from torchtitan_lite.config.loading import user_path
from torchtitan_lite.config.schema import Parallelism
from torchtitan_lite.errors import UserError

_ONE_STAGE = ("1F1B", "GPipe")
_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
_FROM_CSV = ("PipelineScheduleSingle", "PipelineScheduleMulti")
# Schedules that put off weight gradients: their backward comes in halves.
_SPLIT_BACKWARD = ("InterleavedZeroBubble", *_V_SHAPED)
_ACTION_TEXT = re.compile(r"(\d+)([FBIW])(\d+)")
_Action = tuple[int, str, int]  # stage, kind (F forward, B backward, I and W its halves), micro-batch


@dataclass(frozen=True)
class PipelinePlan:
    """stages: module names of each stage, in the model's order. rank_of_stage: pipeline rank that holds it.
    microbatches: of one schedule call, each of microbatch_size samples, `padding` of them empty on every rank.
    split_backward: whether the schedule runs the backward in halves. order: actions of each rank where a file gives
    them, as in the file."""

    schedule: str
    stages: tuple[tuple[str, ...], ...]
    rank_of_stage: tuple[int, ...]
    microbatches: int
    microbatch_size: int
    padding: int
    split_backward: bool
    order: tuple[tuple[str, ...], ...] = ()

    @property
    def ranks(self) -> int:
        return max(self.rank_of_stage) + 1

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank]

    def bubble(self) -> float:
        """The part of a rank's time that fills and drains the pipeline or goes into empty micro-batches, at least:
        costs of stages taken as equal, communication as free.

        Fill and drain are (ranks - 1) turns of one stage; a backward in halves fills two thirds of them. No more
        ranks are busy at once than there are micro-batches.
        """
        real, per_rank = self.microbatches - self.padding, len(self.stages) / self.ranks
        fill = (self.ranks - 1) / per_rank * (1 / 3 if self.split_backward else 1)
        return max(1 - real / (self.microbatches + fill), 1 - real / self.ranks)

    def __str__(self) -> str:
        """`Interleaved1F1B, 4 stages with 2 2 1 1 layers, 8 micro-batches, 6% bubble at least`"""
        layers = " ".join(str(sum("." in name for name in stage)) for stage in self.stages)
        empty = f" ({self.padding} of them empty)" if self.padding else ""
        return (
            f"{self.schedule}, {len(self.stages)} stages with {layers} layers, {self.microbatches} micro-batches"
            f"{empty}, {self.bubble():.0%} bubble at least"
        )


def plan_pipeline(parallelism: Parallelism, flops: Mapping[str, float], samples: int) -> PipelinePlan:
    """The plan for pipeline_parallel_degree > 1.

    flops: of each module that a cut may stand before or after, in the order of the forward pass. samples: the most
    that a data-parallel rank has in a step. Raises UserError.
    """
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    least = -(-samples // parallelism.pipeline_parallel_microbatch_size)
    size = -(-samples // least)  # the smallest that then suffices
    order: tuple[tuple[str, ...], ...] = ()
    if parallelism.pipeline_parallel_schedule_csv:
        rank_of_stage, microbatches, split, order = _read_csv(parallelism)
        if least > microbatches:
            raise UserError(
                f"{parallelism.pipeline_parallel_schedule_csv}: has {microbatches} micro-batches, a step has {least} "
                f"of {parallelism.pipeline_parallel_microbatch_size} samples; raise "
                "parallelism.pipeline_parallel_microbatch_size or give the schedule more"
            )
        stages = _cut(parallelism, flops, len(rank_of_stage))
        if len(stages) != len(rank_of_stage):
            raise UserError(
                f"{parallelism.pipeline_parallel_schedule_csv}: has {len(rank_of_stage)} stages, the recipe cuts the "
                f"model into {len(stages)}; change parallelism.pipeline_parallel_layers_per_stage or "
                "module_fqns_per_model_part to make as many"
            )
    else:
        stages = _cut(parallelism, flops, degree * (1 if schedule in _ONE_STAGE else 2))
        _stages_fit_the_schedule(parallelism, len(stages), sum("." in name for name in flops))
        rank_of_stage = _placement(schedule, degree, len(stages))
        microbatches = microbatches_needed(schedule, least, degree, len(stages))
        split = schedule in _SPLIT_BACKWARD
    return PipelinePlan(
        schedule,
        stages,
        rank_of_stage,
        microbatches,
        size,
        microbatches - least,
        split,
        order,
    )


def microbatches_needed(schedule: str, at_least: int, ranks: int, stages: int) -> int:
    """The fewest micro-batches, `at_least` or more, that torch's schedule of that name takes."""
    if schedule in ("1F1B", "DualPipeV"):
        return max(at_least, stages)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        # As many in each of its rounds.
        count = at_least
        while count % max(1, count // ranks):
            count += 1
        return count
    return at_least


def _cut(parallelism: Parallelism, flops: Mapping[str, float], stages: int) -> tuple[tuple[str, ...], ...]:
    """Module names of each stage: as named, by layers per stage, or `stages` of them by cost."""
    if parallelism.module_fqns_per_model_part:
        return _as_named(parallelism.module_fqns_per_model_part, list(flops))
    layers, degree = [name for name in flops if "." in name], parallelism.pipeline_parallel_degree
    per_stage = parallelism.pipeline_parallel_layers_per_stage
    if per_stage != -1:
        sizes = [len(layers[start : start + per_stage]) for start in range(0, len(layers), per_stage)]
    elif stages > len(layers):
        raise UserError(
            f"parallelism.pipeline_parallel_degree = {degree} with "
            f"{parallelism.pipeline_parallel_schedule} makes {stages} stages of {len(layers)} layers; a stage needs "
            f"one at least: use a degree of {max(1, len(layers) * degree // stages)} or less"
        )
    else:
        sizes = split_by_cost(flops, stages)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    # What stands before the layers joins the first stage, what stands after them the last.
    names, first = list(flops), list(flops).index(layers[0])
    bounds = [0, *(first + end for end in ends[:-1]), len(names)]
    return tuple(tuple(names[start:stop]) for start, stop in pairwise(bounds))


def split_by_cost(flops: Mapping[str, float], stages: int) -> list[int]:
    """Layers of each stage such that the most costly stage is as cheap as can be, and among those splits the squares
    of the costs as small as can be; modules before and after the layers weigh on first and last stage."""
    names = list(flops)
    layers = [index for index, name in enumerate(names) if "." in name]
    costs = [flops[names[index]] for index in layers]
    costs[0] += sum(flops[name] for name in names[: layers[0]])
    costs[-1] += sum(flops[name] for name in names[layers[-1] + 1 :])
    bound = _fewest_cost(costs, stages, float("inf"), max)[0]
    return _fewest_cost(costs, stages, bound, lambda total, cost: total + cost * cost)[1]


def _fewest_cost(
    costs: Sequence[float], stages: int, bound: float, join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The cut of `costs` into that many stages, none above `bound`, with the least of its stages' costs as joined:
    (that, sizes)."""
    # best[n]: of the first n layers on the stages so far.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(stages):
        following: dict[int, tuple[float, list[int]]] = {}
        for start, (joined, sizes) in best.items():
            cost = 0.0
            for end in range(start + 1, len(costs) + 1):
                cost += costs[end - 1]
                if cost > bound:
                    break
                found = (join(joined, cost), [*sizes, end - start])
                following[end] = min(following.get(end, found), found)
        best = following
    return best[len(costs)]


def _as_named(parts: Sequence[Sequence[str]], units: list[str]) -> tuple[tuple[str, ...], ...]:
    key = "parallelism.module_fqns_per_model_part"
    for stage, part in enumerate(parts):
        for name in part:
            if name not in units:
                hint = nearest(name, units) or f"; there are {_span(units)}"
                raise UserError(f"{key}[{stage}]: the model has no module {name}{hint}")
        if not part:
            raise UserError(f"{key}[{stage}]: is empty; a stage needs a module at least")
    named = [name for part in parts for name in part]
    if missing := [name for name in units if name not in named]:
        raise UserError(f"{key}: {missing[0]} is in no stage")
    if named != units:
        at = next(index for index, name in enumerate(named) if index >= len(units) or name != units[index])
        expected = units[at] if at < len(units) else "nothing more"
        raise UserError(f"{key}: {named[at]} stands where the model has {expected}; keep its order, each module once")
    return tuple(tuple(part) for part in parts)


def _stages_fit_the_schedule(parallelism: Parallelism, stages: int, layers: int) -> None:
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if _fit(schedule, stages, degree):
        return
    wanted = "1 stage" if schedule in _ONE_STAGE else "2 stages" if schedule in _V_SHAPED else "2 stages or more"
    said = f"{stages} stages on parallelism.pipeline_parallel_degree = {degree}: {schedule} runs {wanted} on every rank"
    if parallelism.module_fqns_per_model_part:
        raise UserError(f"{said}; give parallelism.module_fqns_per_model_part as many parts")
    valid = [str(size) for size in range(1, layers + 1) if _fit(schedule, -(-layers // size), degree)]
    raise UserError(
        f"{said}; parallelism.pipeline_parallel_layers_per_stage that fit: {', '.join(valid) or 'none'}, or -1"
    )


def _fit(schedule: str, stages: int, ranks: int) -> bool:
    per_rank, left = divmod(stages, ranks)
    return not left and (
        per_rank == 1 if schedule in _ONE_STAGE else per_rank == 2 if schedule in _V_SHAPED else per_rank >= 2
    )


def _placement(schedule: str, ranks: int, stages: int) -> tuple[int, ...]:
    """Round after round over the ranks; V-shaped schedules come back the way they went."""
    if schedule in _V_SHAPED:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(stage % ranks for stage in range(stages))


def _span(units: list[str]) -> str:
    return ", ".join(units if len(units) <= 8 else [*units[:3], "...", *units[-3:]])


def _read_csv(parallelism: Parallelism) -> tuple[tuple[int, ...], int, bool, tuple[tuple[str, ...], ...]]:
    """(rank of each stage, micro-batches, whether backwards come in halves, actions) of a schedule file."""
    path, degree = parallelism.pipeline_parallel_schedule_csv, parallelism.pipeline_parallel_degree
    rows = _actions(path)
    while rows and not rows[-1] and len(rows) > degree:  # blank lines at the end
        rows.pop()
    if len(rows) != degree:
        raise UserError(
            f"{path}: has {len(rows)} lines, parallelism.pipeline_parallel_degree is {degree}; a line is a rank"
        )
    owner: dict[int, int] = {}
    seen: dict[tuple[int, int], str] = {}
    for rank, row in enumerate(rows):
        if not row:
            raise UserError(f"{path}: line {rank + 1} has no actions; every rank needs a stage")
        for stage, kind, microbatch in row:
            if owner.setdefault(stage, rank) != rank:
                raise UserError(f"{path}: stage {stage} is on line {owner[stage] + 1} and on line {rank + 1}")
            seen[stage, microbatch] = seen.get((stage, microbatch), "") + kind
    stages, microbatches = (max(key[at] for key in seen) + 1 for at in (0, 1))
    for stage in range(stages):
        for microbatch in range(microbatches):
            if (kinds := seen.get((stage, microbatch), "nothing")) not in ("FB", "FIW"):
                raise UserError(
                    f"{path}: stage {stage} has {kinds} for micro-batch {microbatch}, expected F and then B, or F, I "
                    "and W"
                )
    _require_runs_through(path, rows, stages)
    split = any("I" in kinds for kinds in seen.values())
    order = tuple(tuple(f"{stage}{kind}{microbatch}" for stage, kind, microbatch in row) for row in rows)
    return tuple(owner[stage] for stage in range(stages)), microbatches, split, order


def _actions(path: str) -> list[list[_Action]]:
    """(stage, kind, micro-batch) of each action of each line."""
    try:
        with user_path(path, "parallelism.pipeline_parallel_schedule_csv").open(newline="") as handle:
            rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(handle)]
    except OSError as error:
        raise UserError(f"parallelism.pipeline_parallel_schedule_csv = {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"parallelism.pipeline_parallel_schedule_csv = {path}: is not text") from None
    parsed: list[list[_Action]] = []
    for line, row in enumerate(rows, start=1):
        parsed.append([])
        for text in row:
            if not (match := _ACTION_TEXT.fullmatch(text)):
                raise UserError(f"{path}: line {line}: {text}: expected an action such as 0F3, 0B3, 0I3 or 0W3")
            parsed[-1].append((int(match[1]), match[2], int(match[3])))
    return parsed


def _require_runs_through(path: str, rows: Sequence[Sequence[_Action]], stages: int) -> None:
    """Raise UserError where ranks would wait for each other: each runs its line in order, a forward after that of the
    stage before, a backward after that of the stage behind."""
    done: set[_Action] = set()
    at = [0] * len(rows)

    def ready(action: _Action) -> bool:
        stage, kind, microbatch = action
        if kind == "F":
            return stage == 0 or (stage - 1, "F", microbatch) in done
        return kind == "W" or stage == stages - 1 or any((stage + 1, back, microbatch) in done for back in "BI")

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row) and ready(row[at[rank]]):
                done.add(row[at[rank]])
                at[rank] += 1
                moved = True
    for rank, row in enumerate(rows):
        if at[rank] < len(row):
            stage, kind, microbatch = row[at[rank]]
            raise UserError(
                f"{path}: line {rank + 1} waits for ever at {stage}{kind}{microbatch}: what it needs comes only after "
                "what waits for it; reorder the lines"
            )
