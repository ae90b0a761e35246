"""Run the trainer on a mesh and on one process, and compare what its own steps computed.

Losses, gradient norms and, from the optimizer's doorstep, every parameter's gradient of the first step.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from tests.parity.routed import Routed, Watch, compare_routed, whole
from tests.ranks import RankPool
from tests.tiny import write_recipe
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.optim.loss import IGNORE

STEPS = 12
_TOGETHER = 500_000  # of small units: several blocks to some of them, and several units to a stage


@dataclass(frozen=True, eq=False)
class Case:
    """A mesh: its name, ranks, overrides of the recipe, and what the single process it is held to shares with it.

    model: tests.tiny's SPEC and flavor. recipe: overrides that the single process has too.
    """

    name: str
    ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    model: str = "DEEP_LLAMA/untied"
    recipe: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def alone(self) -> "Case":
        """The single process that this case is held to: the same model and recipe, one rank."""
        return replace(self, name="alone", ranks=1, overrides={})

    def arguments(self) -> list[str]:
        spec, flavor = self.model.split("/")
        chosen = {"model.spec": f"tests.tiny:{spec}", "model.flavor": flavor, **self.recipe, **self.overrides}
        return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in chosen.items()]


@dataclass(frozen=True)
class Result:
    """losses, norms: of each step. validation: before the first step and after the last. grads: clipped gradients of
    the first step. routed: what went to which expert."""

    losses: list[float]
    norms: list[float]
    validation: list[float]
    grads: dict[str, torch.Tensor]
    routed: Routed


@dataclass(frozen=True)
class Difference:
    """The largest relative differences of a case from the single process. choices: other experts chosen (a number);
    balance: of what is counted and averaged about them. ties: choices between equal scores that fell the other way."""

    choices: int
    balance: float
    loss: float
    norm: float
    grad: float
    grad_name: str
    losses: float
    validation: float
    ties: int


# What a case may differ by in float32: choices of experts and their balance; first loss, first norm, worst gradient,
# any of twelve losses, validation. Ties are no difference, but more than a few are no ties.
LIMITS = {
    "choices": 0,
    "ties": 2,
    "balance": 2e-6,
    "loss": 1e-6,
    "norm": 1e-6,
    "grad": 5e-6,
    "losses": 2e-6,
    "validation": 2e-6,
}

# bfloat16 keeps 8 bits: what is within these is rounding that falls elsewhere. No case has experts.
BF16_LIMITS = {
    "choices": 0,
    "ties": 0,
    "balance": 0,
    "loss": 1e-4,
    "norm": 1e-3,
    "grad": 3e-2,
    "losses": 5e-4,
    "validation": 5e-4,
}

# Float8 keeps 3 bits of a number, and what differs in the last bit of float32 rounds to another one here and there:
# then a gradient moves, and all after it.
F8_LIMITS = {
    "choices": 0,
    "ties": 0,
    "balance": 0,
    "loss": 1e-6,
    "norm": 1e-5,
    "grad": 1e-2,
    "losses": 2e-4,
    "validation": 2e-4,
}

# Scales of experts' products are powers of two: rounding depends on nothing but the number. What differs in its last
# bit may round to another one all the same.
GROUPED_LIMITS = {
    "choices": 0,
    "ties": 2,
    "balance": 2e-5,
    "loss": 1e-6,
    "norm": 1e-5,
    "grad": 1e-3,
    "losses": 2e-5,
    "validation": 2e-5,
}


def limits_of(case: Case) -> dict[str, float]:
    converters = case.recipe.get("model.converters", ())
    if converters:
        return F8_LIMITS if "quantize.linear.float8" in converters else GROUPED_LIMITS
    return BF16_LIMITS if case.recipe.get("training.mixed_precision_param") == "bfloat16" else LIMITS


def base_recipe(folder: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        folder / "parity.toml",
        corpus,
        cache,
        training={"seq_len": 64, "global_batch_size": 8, "steps": STEPS, "max_norm": 0.5},
        optimizer={"lr": 1e-3},
        data={"validation_fraction": 0.2, "document_mask": True, "cache_folder": str(cache)},
        validation={"enable": True, "steps": 1},
    )


def run_case(
    pool: RankPool,
    recipe: Path,
    case: Case,
    steps: int = STEPS,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Result:
    """within: what each rank runs in (see mutants)."""
    parts = pool.run(_train, case.ranks, str(recipe), case.arguments(), steps, within, timeout=300.0)
    grads = {name: grad for part in parts for name, grad in part[3].items()}
    losses = [sum(step) for step in zip(*(part[0] for part in parts), strict=True)]
    for _, norms, validation, *_ in parts:
        assert norms == parts[0][1], f"{case}: ranks disagree on the gradient norm"
        assert validation == parts[0][2], f"{case}: ranks disagree on the validation loss"
    # The choices first: where they differ, nothing else is comparable.
    routed = whole((part[4] for part in parts), parts[0][5], parts[0][6])
    return Result(losses, parts[0][1], parts[0][2], grads, routed)


class Alone:
    """Single processes of so many steps, each run once for all the cases that are held to it."""

    def __init__(self, pool: RankPool, recipe: Path, steps: int = STEPS) -> None:
        self.pool, self.recipe, self.steps = pool, recipe, steps
        self._results: dict[str, Result] = {}

    def of(self, case: Case) -> Result:
        key = " ".join(case.alone.arguments())
        if key not in self._results:
            self._results[key] = run_case(self.pool, self.recipe, case.alone, self.steps)
        return self._results[key]


def compare(found: Result, expected: Result) -> Difference:
    assert set(found.grads) == set(expected.grads), set(found.grads) ^ set(expected.grads)

    def error(name: str) -> float:
        grad = expected.grads[name].double()
        return float((found.grads[name].double() - grad).norm() / grad.norm())

    worst = max(expected.grads, key=error)
    routed = compare_routed(found.routed, expected.routed)
    steps = routed.steps
    return Difference(
        choices=routed.choices,
        balance=routed.balance,
        ties=routed.ties,
        loss=_relative(found.losses[:1], expected.losses[:1]),
        norm=_relative(found.norms[:1], expected.norms[:1]),
        grad=error(worst),
        grad_name=worst,
        losses=_relative(found.losses[:steps], expected.losses[:steps]),
        validation=_relative(
            found.validation[: 1 if routed.ties else 2], expected.validation[: 1 if routed.ties else 2]
        ),
    )


def exceeded(difference: Difference, limits: dict[str, float] = LIMITS) -> dict[str, float]:
    """What is beyond its limit; a NaN is."""
    return {key: value for key, limit in limits.items() if not (value := getattr(difference, key)) <= limit}


def _relative(found: list[float], expected: list[float]) -> float:
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return float("nan") if any(value != value for value in differences) or not differences else max(differences)


def _train(
    recipe: str, arguments: list[str], steps: int, within: Callable[[], AbstractContextManager[Any]]
) -> tuple[Any, ...]:
    """This rank's part of the loss of each step, the norms, the validation loss, the gradients it answers for, what it
    saw of choices, samples of a step and their length."""
    # Whole gradients are put together here and nowhere else; how many collectives that takes does not matter.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    with patch("torchtitan_lite.distributed.data_parallel._TOGETHER", _TOGETHER), within():
        return _trained(recipe, arguments, steps)


def _trained(recipe: str, arguments: list[str], steps: int) -> tuple[Any, ...]:
    import torch.distributed as dist

    from torchtitan_lite.distributed import runtime
    from torchtitan_lite.elastic.watchdog import Watchdog
    from torchtitan_lite.observability.sinks import RunLog
    from torchtitan_lite.preflight import plan_job, prepare_job
    from torchtitan_lite.trainer import Trainer

    plan = plan_job(recipe, arguments, dist.get_world_size())
    here = runtime.Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "CPU")
    log = RunLog(plan.folder, writes=False)
    asleep = Watchdog(plan.config.comm, plan.folder, here, log.event)
    trainer = Trainer(plan, prepare_job(plan), here, log, asleep)
    grads: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        if not grads:
            grads.update({name: _full(_grad(parameter)) for name, parameter in trainer.model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    held_out = trainer.held_out
    assert held_out is not None

    def validate() -> float:
        return trainer.model.evaluate(_ragged(batch) for batch in _validation(trainer, held_out)).item()

    validation = [validate()]
    watch = Watch(trainer)
    results = []
    for _ in range(steps):
        results.append(trainer.step([_ragged(batch) for batch in trainer.loader.next_step()]))
        watch.step(results[-1])
    validation.append(validate())
    at = plan.dims.coordinate(here.rank)
    answers = all(place == 0 for axis, place in at.items() if axis != "pp")
    return (
        [float(result.loss) for result in results],
        [float(result.grad_norm) for result in results],
        validation,
        grads if answers else {},
        watch.parts(),
        plan.batch.global_batch_size,
        plan.config.training.seq_len,
    )


def _validation(trainer: Any, store: Any) -> Any:
    from torchtitan_lite.data.loader import validation_batches

    return validation_batches(
        store, 7, trainer.plan.batch.microbatch_size, trainer.batch_rank, trainer.plan.dims.batch_ranks
    )


def _ragged(batch: Batch) -> Batch:
    """Some labels taken out, in each sample another number of them: means of means show."""
    labels = batch.labels.clone()
    positions = torch.arange(labels.shape[1])
    cut = batch.tokens.sum(dim=1, keepdim=True) % (labels.shape[1] // 2)
    labels[positions < cut] = IGNORE
    return replace(batch, labels=labels)


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A gradient that is not there counts as zero: the optimizer passes over it without a word."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
