"""Qwen3's mixtures of experts against the Hugging Face implementation with the same weights, and as published."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.qwen3.test_qwen3 import their_config, their_name
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.common.routing import Routing, Rules
from torchtitan_lite.models.qwen3 import SPEC
from torchtitan_lite.models.qwen3.args import FLAVORS, Qwen3Args

ARGS = Qwen3Args(64, 3, 4, 2, 48, head_dim=24, vocab_size=128, max_seq_len=64, rope_theta=1e4, moe=MoEShape(8, 3))

# Elements in the published weights of Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B, and what their names promise.
PUBLISHED = {"30B-A3B": (30_532_122_624, 3.3e9), "235B-A22B": (235_093_634_560, 22.2e9)}


def _theirs(args: Qwen3Args) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    assert args.moe is not None
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **their_config(args),
            moe_intermediate_size=args.ffn_dim,
            num_experts=args.moe.num_experts,
            num_experts_per_tok=args.moe.top_k,
            norm_topk_prob=True,
        )
    )


def _their_weights(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in ours.items():
        stem, _, leaf = name.rpartition(".")
        layer = ".".join(name.split(".")[:2])
        if leaf == "w1":
            found[f"model.{layer}.mlp.experts.gate_up_proj"] = torch.cat((value, ours[f"{stem}.w3"]), dim=1)
        elif leaf == "w2":
            found[f"model.{layer}.mlp.experts.down_proj"] = value
        elif "router" in name:
            found[f"model.{layer}.mlp.gate.weight"] = value
        elif leaf != "w3":
            found[their_name(name)] = value
    return found


def test_logits_and_gradients_are_those_of_the_reference() -> None:
    ours, theirs = SPEC.build(ARGS), _theirs(ARGS)
    initialize(ours, 1, lambda name: SPEC.initial(name, ARGS))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
            if "router" in name or "experts" in name:  # as they are, all experts weigh much the same and give little
                parameter.mul_(10.0)
    missing, unexpected = theirs.load_state_dict(
        _their_weights({name: value.detach() for name, value in ours.named_parameters()})
    )
    assert not missing
    assert not unexpected
    tokens = torch.randint(ARGS.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    found, expected = ours(tokens), theirs(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(direction)
    expected.backward(direction)
    grads = _their_weights({name: parameter.grad for name, parameter in ours.named_parameters()})  # type: ignore[misc]
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad - grads[name]).norm() < 1e-5 * parameter.grad.norm(), name


def test_the_balance_loss_is_that_of_the_reference_over_top_k() -> None:
    """Theirs sums over the choices of a token what ours averages."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(2))
    _, _, balance = Routing(3, Rules(aux_loss_coeff=1.0))(logits, torch.zeros(8), torch.ones(1))
    expected = load_balancing_loss_func((logits[0],), 8, 3) / 3
    assert balance[1][-2].item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_parameters_are_those_published(flavor: str) -> None:
    total, active = PUBLISHED[flavor]
    assert FLAVORS[flavor].parameter_count() == total
    assert FLAVORS[flavor].active_parameter_count() == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_built_module_has_as_many_parameters_as_its_arguments_say(shared: int) -> None:
    args = replace(ARGS, moe=MoEShape(8, 3, shared))
    with torch.device("meta"):
        module = SPEC.build(args)
    assert sum(parameter.numel() for parameter in module.parameters()) == args.parameter_count()
    assert args.parameter_count() - args.active_parameter_count() == 3 * (8 - 3) * 3 * 64 * 48


def test_flops_are_those_of_the_active_experts() -> None:
    attention = 64 * 96 + 2 * 64 * 48 + 96 * 64 + 2 * 24
    layer = attention + 64 * 8 + 3 * 3 * 64 * 48 + 2 * 64
    assert ARGS.flops_by_module(64)["layers.1"] == 6 * layer + 6 * 96 * 64
    per_token = sum(ARGS.flops_by_module(1).values())
    embedding = ARGS.vocab_size * ARGS.dim
    assert per_token == 6 * (ARGS.active_parameter_count() - embedding) + 3 * 6 * 96


def test_a_dense_model_is_all_active() -> None:
    assert FLAVORS["8B"].active_parameter_count() == FLAVORS["8B"].parameter_count()


def test_the_debug_mixture_works_as_hard_as_the_dense_debug_model() -> None:
    dense, mixture = (sum(FLAVORS[name].flops_by_module(256).values()) for name in ("debugmodel", "debugmodel_moe"))
    assert mixture == pytest.approx(dense, rel=0.005)


def test_widths_that_grouped_products_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 64 and ffn_dim 20 of experts must be multiples of 8"):
        replace(ARGS, ffn_dim=20)
