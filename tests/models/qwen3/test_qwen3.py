"""Qwen3 against the Hugging Face implementation with the same weights, and its shapes against what is published."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.llama3.test_model import LAYER_NAMES, TOP_NAMES
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.qwen3 import SPEC
from torchtitan_lite.models.qwen3.args import FLAVORS, Qwen3Args

_NAMES = {**LAYER_NAMES, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
BASE = Qwen3Args(64, 3, 4, 2, 96, head_dim=24, vocab_size=128, max_seq_len=64, rope_theta=10_000.0)

# Elements in the published weights; Qwen/Qwen3-0.6B and so on.
PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


def their_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{leaf}"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[rest]}.{leaf}"


def their_config(args: Qwen3Args) -> dict[str, Any]:
    """What dense models and mixtures have in common."""
    return {
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_theta": args.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": args.tied,
        "attn_implementation": "eager",
    }


def _theirs(args: Qwen3Args) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**their_config(args)))


@pytest.mark.parametrize("args", [BASE, replace(BASE, tied=True)], ids=["untied", "tied"])
def test_logits_and_gradients_are_those_of_the_reference(args: Qwen3Args) -> None:
    ours, theirs = SPEC.build(args), _theirs(args)
    initialize(ours, 1, lambda name: SPEC.initial(name, args))
    with torch.no_grad():  # norms of ones would hide a norm that is left out
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
    weights = {their_name(name): value.detach() for name, value in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    tokens = torch.randint(args.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    found, expected = ours(tokens), theirs(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(direction)
    expected.backward(direction)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = grads[their_name(name)]
        assert (parameter.grad - reference).norm() < 1e-5 * reference.norm(), name


@pytest.mark.parametrize(("flavor", "parameters"), PUBLISHED.items())
def test_parameters_are_those_published(flavor: str, parameters: int) -> None:
    assert FLAVORS[flavor].parameter_count() == parameters


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_built_module_has_as_many_parameters_as_its_arguments_say(flavor: str) -> None:
    with torch.device("meta"):
        module = SPEC.build(FLAVORS[flavor])
    assert sum(parameter.numel() for parameter in module.parameters()) == FLAVORS[flavor].parameter_count()


def test_flops_by_hand() -> None:
    flops = BASE.flops_by_module(64)
    projections = 64 * 96 + 2 * 64 * 48 + 96 * 64
    layer = projections + 3 * 64 * 96 + 2 * 64 + 2 * 24
    assert flops["layers.1"] == 6 * layer + 6 * 96 * 64
    assert flops["output"] == 6 * 64 * 128
    assert list(flops) == ["tok_embeddings", "layers.0", "layers.1", "layers.2", "norm", "output"]
    assert flops["tok_embeddings"] == 0.0


def test_heads_that_do_not_share_alike_are_refused() -> None:
    with pytest.raises(ValueError, match="n_kv_heads 3 must divide n_heads 4"):
        replace(BASE, n_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim 7 must be even"):
        replace(BASE, head_dim=7)
