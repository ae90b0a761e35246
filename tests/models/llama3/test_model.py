"""Llama 3 against the Hugging Face implementation with the same weights: logits, gradients, rotary tables."""

import dataclasses
from typing import Any

import pytest
import torch

from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.common.rope import apply_rope, rope_table
from torchtitan_lite.models.common.rope_scaling import RopeScaling
from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.models.llama3.args import Llama3Args

TOP_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}

BASE = Llama3Args(64, 3, 4, 2, 96, vocab_size=128, max_seq_len=64, rope_theta=10_000.0)
SHAPES = {
    "grouped": BASE,
    "tied": dataclasses.replace(BASE, tied=True),
    "all heads": dataclasses.replace(BASE, n_kv_heads=4),
    # Short enough an original length that all three regimes of the scaling occur.
    "scaled": dataclasses.replace(BASE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, original_max_seq_len=64)),
}


def _their_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{leaf}"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}.{leaf}"


def _theirs(args: Llama3Args) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_theta": args.rope_theta, "rope_type": "default"}
    if args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.dim,
            intermediate_size=args.ffn_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads,
            vocab_size=args.vocab_size,
            max_position_embeddings=args.max_seq_len,
            rms_norm_eps=args.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=args.tied,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_the_reference(shape: str) -> None:
    args = SHAPES[shape]
    ours, theirs = SPEC.build(args), _theirs(args)
    initialize(ours, 1, lambda name: SPEC.initial(name, args))
    weights = {_their_name(name): value.detach() for name, value in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if args.tied else [])
    theirs.tie_weights()
    tokens = torch.randint(args.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    logits, expected = ours(tokens), theirs(tokens).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad, reference = parameter.grad, their_grads[_their_name(name)]
        assert grad is not None
        assert (grad - reference).norm() < 1e-5 * reference.norm(), name


def test_attention_is_causal() -> None:
    args = SHAPES["grouped"]
    model = SPEC.build(args)
    initialize(model, 1, lambda name: SPEC.initial(name, args))
    tokens = torch.randint(args.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % args.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.allclose(before[0, 10:], after[0, 10:])


def test_rotation_depends_on_distance_alone() -> None:
    table = rope_table(torch.arange(64), 16, 10_000.0, None)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        (apply_rope(q, table[:, at : at + 1]) * apply_rope(k, table[:, at + 5 : at + 6])).sum().item()
        for at in (0, 7, 50)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
