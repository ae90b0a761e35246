"""Routing, experts and balance of a mixture by hand: against a loop over tokens, and against arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from torchtitan_lite.balance import Balance, routing_record
from torchtitan_lite.config.schema import MoE as MoESection
from torchtitan_lite.models.common.initialize import initial_rows, initialize
from torchtitan_lite.models.common.moe import MoE, apply_routing
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.common.routing import EXTRAS, Routing, Rules
from torchtitan_lite.models.spec import Init

B, L, D, F, E, K = 3, 10, 16, 24, 6, 2


def _moe(rules: Rules | None = None, shared: int = 0) -> MoE:
    model = nn.ModuleDict({"moe": MoE(D, F, MoEShape(E, K, shared))})
    apply_routing(model, "moe", rules or Rules(), None)
    initialize(model, 3, lambda name: Init(std=0.3))
    return model["moe"]  # type: ignore[return-value]


def _x() -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), requires_grad=True)


def _swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x))


def _by_hand(moe: MoE, x: Tensor, capacity: int | None = None) -> tuple[Tensor, int]:
    """A token after the other; and how many choices an expert that is full has dropped."""
    out, dropped = torch.zeros_like(x), 0
    for b in range(B):
        taken = [0] * E
        for position in range(L):
            token = x[b, position]
            scores = (moe.router.weight @ token).softmax(-1)
            chosen = (scores + moe.expert_bias).topk(K).indices.tolist()
            for expert in chosen:
                if capacity is not None and taken[expert] == capacity:
                    dropped += 1
                    continue
                taken[expert] += 1
                weights = (each[expert] for each in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
                share = scores[expert] / sum(scores[other] for other in chosen)
                out[b, position] = out[b, position] + share * _swiglu(token, *weights)
            if moe.shared is not None:
                out[b, position] = out[b, position] + moe.shared(token)
    return out, dropped


def _gradients(moe: MoE, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    parameters = {"x": x, **dict(moe.named_parameters())}
    grads = torch.autograd.grad(out, list(parameters.values()), direction, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def _require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("shared", [0, 2])
def test_a_mixture_is_its_experts_token_for_token(shared: int) -> None:
    moe, x = _moe(shared=shared), _x()
    moe.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))  # moves choices, not weights
    found, (expected, _) = moe(x), _by_hand(moe, x)
    assert torch.allclose(found, expected, atol=1e-5)
    _require_close(_gradients(moe, x, found), _gradients(moe, x, expected))


@contextmanager
def _nothing_in_the_tail() -> Iterator[None]:
    """Grouped products with NaNs where torch leaves memory as it was, forward and backward."""
    right = torch.nn.functional.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
            ctx.save_for_backward(rows, weights, ends)
            out = right(rows, weights, offs=ends)
            out[ends[-1] :] = float("nan")
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            rows, weights, ends = ctx.saved_tensors
            with torch.enable_grad():
                rows, weights = rows.detach().requires_grad_(), weights.detach().requires_grad_()
                d_rows, d_weights = torch.autograd.grad(right(rows, weights, offs=ends), (rows, weights), grad)
            d_rows[ends[-1] :] = float("nan")
            return d_rows, d_weights, None

    with patch("torch.nn.functional.grouped_mm", lambda rows, weights, offs: Poisoned.apply(rows, weights, offs)):
        yield


def test_full_experts_drop_the_later_tokens_and_nothing_of_the_tail_is_read() -> None:
    # 1.2 x 10 tokens x 2 choices / 6 experts = 4.
    moe, x = _moe(Rules(capacity_factor=1.2)), _x()
    with _nothing_in_the_tail():
        found = moe(x)
        grads = _gradients(moe, x, found)
    expected, dropped = _by_hand(moe, x, capacity=4)
    assert dropped > 5
    assert torch.allclose(found, expected, atol=1e-5)
    _require_close(grads, _gradients(moe, x, expected))


def test_a_token_is_dropped_for_no_token_behind_it() -> None:
    moe, x = _moe(Rules(capacity_factor=0.6)), _x()
    first = moe(x).detach()
    x.data[:, 5:] += 1.0
    assert torch.allclose(moe(x)[:, :5], first[:, :5], atol=1e-6)


def test_what_is_counted_by_hand() -> None:
    rules = Rules(aux_loss_coeff=0.5, z_loss_coeff=0.25, capacity_factor=1.2)
    moe, x = _moe(rules), _x()
    weights = torch.tensor([0.25, 0.0, 0.75])  # the second sample fills up the batch
    moe(x, weights).sum().backward()
    logits = moe.router(x)
    scores, chosen = logits.softmax(-1), logits.topk(K).indices
    counts = torch.stack([(chosen[b].flatten()[:, None] == torch.arange(E)).sum(0) for b in range(B)])
    assert torch.equal(moe.counted[:E], (counts[0] + counts[2]).double())
    aux = (counts / (L * K) * scores.mean(1)).sum(-1) * E
    z = logits.logsumexp(-1).square().mean(-1)
    dropped = (counts - 4).clamp(min=0).sum(1)
    assert moe.counted[E:].tolist() == pytest.approx(
        [int(dropped[0] + dropped[2]), (weights @ aux).item(), (weights @ z).item()], rel=1e-6
    )
    # Beside the gradient of the output, that of the losses: as if they had been added to it.
    grad = moe.router.weight.grad
    (out_grad,) = torch.autograd.grad(moe(x).sum(), moe.router.weight)
    (loss_grad,) = torch.autograd.grad(weights @ (0.5 * aux + 0.25 * z), moe.router.weight)
    assert grad is not None
    assert torch.allclose(grad - out_grad, loss_grad, atol=1e-5)


def test_even_routing_has_a_balance_loss_of_one() -> None:
    rules = Rules(aux_loss_coeff=0.1, forced=True)
    _, _, balance = Routing(K, rules)(torch.zeros(B, 2 * E, E), torch.zeros(E), torch.full((B,), 1 / B))
    assert balance is not None
    record = routing_record(balance[1][None], MoESection(aux_loss_coeff=0.1))
    assert record["moe_z_loss"] is None
    assert record["moe_aux_loss"] == pytest.approx(1.0, rel=1e-6)
    assert record["moe_entropy"] == pytest.approx(1.0)
    assert record["moe_largest_share"] == pytest.approx(1 / E)
    assert record["moe_tokens_per_expert"] == [[B * 2 * K] * E]
    assert record["moe_dropped"] == 0


def test_an_expert_that_nobody_chooses_has_no_entropy_and_a_gradient_of_zero() -> None:
    counted = torch.zeros(1, E + EXTRAS, dtype=torch.float64)
    counted[0, 2] = 7
    assert routing_record(counted, MoESection())["moe_entropy"] == 0.0
    moe, x = _moe(), _x()
    moe.expert_bias[4] = -100.0
    moe(x).sum().backward()
    assert moe.experts.w1.grad is not None
    assert not moe.experts.w1.grad[4].any()


def test_choices_in_turn_go_to_different_experts() -> None:
    experts, weights, _ = Routing(4, Rules(forced=True))(torch.randn(1, 9, E), torch.zeros(E), None)
    assert experts[0, :3].tolist() == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    assert torch.allclose(weights.sum(-1), torch.ones(1, 9))


def test_forward_alone_counts_nothing() -> None:
    moe, x = _moe(), _x()
    with torch.no_grad():
        moe(x, torch.ones(B))
    moe(x, torch.ones(B))
    assert not moe.counted.any()


def test_the_router_is_in_float32_whatever_the_model_is() -> None:
    moe = _moe().to(torch.bfloat16)
    assert moe.router(_x().to(torch.bfloat16)).dtype == torch.float32


def test_the_bias_moves_towards_even_shares_and_stays_centred(one_rank: None) -> None:
    model = nn.ModuleDict({"moe": _moe()})
    balance = Balance([model], ["moe"], E, 0.01, torch.device("cpu"))
    model["moe"].counted[:E] = torch.tensor([9.0, 1, 1, 1, 3, 3])  # the mean is 3
    counted = balance.step()
    assert counted[0, :E].tolist() == [9, 1, 1, 1, 3, 3]
    # Down one, up three, two as they are: two steps up in sum, taken off evenly.
    expected = 0.01 * (torch.tensor([-1.0, 1, 1, 1, 0, 0]) - 2 / 6)
    assert torch.allclose(model["moe"].expert_bias, expected)
    assert not model["moe"].counted.any()
    assert not balance.step().any()


@pytest.fixture
def one_rank() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_expert_is_drawn_by_a_name_of_its_own() -> None:
    model = nn.ModuleDict({"moe": MoE(D, F, MoEShape(E, K))})
    initialize(model, 5, lambda name: Init(std=1.0))
    w2 = model["moe"].experts.w2
    for expert in range(E):
        drawn = initial_rows(f"moe.experts.w2.{expert}", torch.Size((D, F)), 5, Init(std=1.0), 0, D)
        assert torch.equal(w2[expert], drawn)
    assert not torch.equal(w2[0], w2[1])
