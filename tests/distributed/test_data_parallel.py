"""FSDP2, HSDP and DDP against a plain single process: the loss and every parameter's gradient, in float32."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from tests.ranks import RankPool
from tests.tiny import SPEC
from torchtitan_lite.assembly import Recipe, assemble
from torchtitan_lite.config.resolution import plan_batch
from torchtitan_lite.config.schema import Debug, JobConfig, Parallelism, Training
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.mesh import build_mesh
from torchtitan_lite.distributed.parallel_dims import ParallelDims
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.loss import IGNORE
from torchtitan_lite.trainable import TrainableModel

SEED = 42
SEQ_LEN = 24


@dataclass(frozen=True)
class Case:
    ranks: int
    replicate: int
    shard: int
    global_batch: int = 8
    local_batch: int = 8
    reshard: Any = "default"
    flavor: str = "tiny"

    def __str__(self) -> str:
        return (
            f"replicate{self.replicate}-shard{self.shard}-batch{self.global_batch}-local{self.local_batch}-"
            f"{self.reshard}-{self.flavor}"
        )


CASES = [
    Case(1, 1, 1),
    Case(1, 1, 1, local_batch=3),
    Case(2, 1, 2),
    Case(2, 1, 2, flavor="tied"),
    Case(2, 1, 2, reshard="never"),
    Case(2, 1, 2, local_batch=1),
    Case(2, 2, 1),
    Case(2, 2, 1, local_batch=1),
    Case(2, 2, 1, flavor="tied"),
    Case(3, 1, 3),
    Case(3, 3, 1, local_batch=2),
    Case(3, 1, 3, global_batch=2),
    Case(4, 1, 4),
    Case(4, 2, 2),
    Case(4, 2, 2, local_batch=1),
    Case(4, 2, 2, flavor="tied", global_batch=7),
    Case(4, 4, 1),
    pytest.param(Case(8, 2, 4, global_batch=11, local_batch=1), marks=pytest.mark.ranks(8)),
    pytest.param(Case(8, 1, 8), marks=pytest.mark.ranks(8)),
]


def _samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [count, SEQ_LEN]; every sample with another number of labels, so that means of means show."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(SPEC.flavors["tiny"].vocab_size, (count, SEQ_LEN + 1), generator=generator)
    labels = rows[:, 1:].clone()
    for row in range(count):
        labels[row, : 2 * row % SEQ_LEN] = IGNORE
    return rows[:, :-1].contiguous(), labels


def _plain(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of an unwrapped module on the whole batch at once."""
    args = SPEC.flavors[case.flavor]
    module = SPEC.build(args)
    initialize(module, SEED, lambda name: SPEC.initial(name, args))
    tokens, labels = _samples(case.global_batch)
    loss = F.cross_entropy(module(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in module.named_parameters()}


def _assemble(case: Case, param_dtype: Any = "float32") -> TrainableModel:
    dims = ParallelDims(dp_replicate=case.replicate, dp_shard=case.shard)
    config = JobConfig(
        training=Training(seq_len=SEQ_LEN, mixed_precision_param=param_dtype),
        parallelism=Parallelism(fsdp_reshard_after_forward=case.reshard),
        debug=Debug(seed=SEED),
    )
    args = SPEC.flavors[case.flavor]
    recipe = Recipe(config, dims, SPEC, args, SPEC.plan(args), None)
    return assemble(recipe, build_mesh(dims, "cpu"), torch.device("cpu"), dist.get_rank())


def _batches(case: Case) -> list[Batch]:
    plan = plan_batch(case.global_batch, case.local_batch, case.ranks)
    share = list(plan.share(dist.get_rank()))
    tokens, labels = _samples(case.global_batch)
    batches = []
    for start in range(0, plan.microbatches * plan.microbatch_size, plan.microbatch_size):
        own = share[start : start + plan.microbatch_size]
        batch = Batch(
            torch.zeros((plan.microbatch_size, SEQ_LEN), dtype=torch.int64),
            torch.full((plan.microbatch_size, SEQ_LEN), IGNORE),
        )
        batch.tokens[: len(own)], batch.labels[: len(own)] = tokens[own], labels[own]
        batches.append(batch)
    return batches


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread(case: Case) -> tuple[float, dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Loss, gradients, norm before clipping to 0.5 and gradients after it, on this rank."""
    model = _assemble(case)
    loss = model.forward_backward(_batches(case)).double()
    dist.all_reduce(loss)
    parameters = dict(model.named_parameters())
    grads = {name: _full(parameter.grad).clone() for name, parameter in parameters.items()}
    norm = clip_by_global_norm(parameters.values(), 0.5, None)
    clipped = {name: _full(parameter.grad) for name, parameter in parameters.items()}
    return loss.item(), grads, norm.item(), clipped


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_norm_are_those_of_one_process(pool: RankPool, case: Case) -> None:
    loss, grads = _plain(case)
    norm = sum(grad.double().square().sum().item() for grad in grads.values()) ** 0.5
    for found_loss, found_grads, found_norm, clipped in pool.run(_spread, case.ranks, case):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-6)
        assert set(found_grads) == set(grads)
        for name, grad in grads.items():
            error = (found_grads[name] - grad).norm() / grad.norm()
            assert error < 2e-6, f"{name}: gradient off by {error:.2e}"
            assert torch.allclose(clipped[name], grad * (0.5 / norm), rtol=1e-4, atol=1e-7), name


def _weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: _full(parameter.data) for name, parameter in _assemble(case).named_parameters()}


@pytest.mark.parametrize("case", [Case(2, 1, 2), Case(3, 1, 3), Case(4, 2, 2), Case(4, 4, 1, flavor="tied")], ids=str)
def test_initial_weights_are_the_same_bits_on_every_mesh(pool: RankPool, case: Case) -> None:
    (plain,) = pool.run(_weights, 1, Case(1, 1, 1, flavor=case.flavor))
    for weights in pool.run(_weights, case.ranks, case):
        assert all(torch.equal(weights[name], plain[name]) for name in plain)


def _bfloat16_step(case: Case) -> tuple[float, set[torch.dtype], set[torch.dtype]]:
    model = _assemble(case, "bfloat16")
    loss = model.forward_backward(_batches(case)).double()
    dist.all_reduce(loss)
    parameters = list(model.parameters())
    return loss.item(), {p.dtype for p in parameters}, {p.grad.dtype for p in parameters}


@pytest.mark.parametrize("case", [Case(1, 1, 1), Case(2, 1, 2), Case(2, 2, 1)], ids=str)
def test_bfloat16_keeps_float32_masters_on_every_mesh(pool: RankPool, case: Case) -> None:
    loss, _ = _plain(case)
    for found, dtypes, grad_dtypes in pool.run(_bfloat16_step, case.ranks, case):
        assert dtypes == grad_dtypes == {torch.float32}
        assert found == pytest.approx(loss, rel=5e-3)
        assert found != pytest.approx(loss, rel=1e-7)  # it did compute in another precision


def _validation(case: Case) -> float:
    return _assemble(case).evaluate(_batches(case)).item()


def test_validation_gives_the_same_value_on_every_mesh(pool: RankPool) -> None:
    loss, _ = _plain(Case(1, 1, 1))
    for case in (Case(1, 1, 1), Case(2, 1, 2), Case(3, 3, 1), Case(4, 2, 2, local_batch=1)):
        assert pool.run(_validation, case.ranks, case) == pytest.approx([loss] * case.ranks, rel=1e-6)
