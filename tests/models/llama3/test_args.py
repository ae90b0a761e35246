"""Shapes of the Llama 3 family against what is published, and FLOPs against arithmetic by hand."""

from dataclasses import replace

import pytest
import torch

from torchtitan_lite.models.common.rope import rope_table
from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.models.llama3.args import FLAVORS, Llama3Args

# Elements in the published weights; meta-llama/Llama-3.2-1B and so on.
PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


def _flops(args: Llama3Args, seq_len: int) -> float:
    return sum(args.flops_by_module(seq_len).values())


@pytest.mark.parametrize(("flavor", "parameters"), PUBLISHED.items())
def test_parameters_are_those_published(flavor: str, parameters: int) -> None:
    assert FLAVORS[flavor].parameter_count() == parameters


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_built_module_has_as_many_parameters_as_its_arguments_say(flavor: str, tied: bool) -> None:
    args = replace(FLAVORS[flavor], tied=tied)
    with torch.device("meta"):
        module = SPEC.build(args)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == args.parameter_count()


def test_parameters_of_a_small_shape_by_hand() -> None:
    args = Llama3Args(dim=8, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=12, vocab_size=10)
    queries_and_output = 8 * 8 + 8 * 8
    keys_and_values = 2 * (8 * 4)
    feed_forward = 3 * 8 * 12
    norms = 2 * 8
    layers = 2 * (queries_and_output + keys_and_values + feed_forward + norms)
    assert args.parameter_count() == 10 * 8 + layers + 8 + 8 * 10
    assert replace(args, tied=True).parameter_count() == 10 * 8 + layers + 8


def test_flops_of_8b_by_hand() -> None:
    layer = (
        2 * 4096 * 4096  # queries, output
        + 2 * 4096 * 1024  # keys, values: 8 heads of 128
        + 3 * 4096 * 14_336  # SwiGLU
        + 2 * 4096  # norms
    )
    multiplied = 32 * layer + 4096 + 128_256 * 4096  # the embedding is looked up, the output matrix multiplies
    scores = 2 * 4096 * 8192  # a query against 8,192 keys, all heads
    values = 2 * 4096 * 8192
    attention = 3 * (scores + values) // 2  # forward and twice that backward, of which a causal mask leaves half
    assert _flops(FLAVORS["8B"], 8192) == 6 * multiplied + 32 * attention
    assert _flops(FLAVORS["8B"], 8192) == 6 * (8_030_261_248 - 525_336_576) + 6_442_450_944


def test_flops_of_70b_by_hand() -> None:
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672 + 2 * 8192
    multiplied = 80 * layer + 8192 + 128_256 * 8192
    attention = 3 * (2 * 8192 * 8192 + 2 * 8192 * 8192) // 2
    assert _flops(FLAVORS["70B"], 8192) == 6 * multiplied + 80 * attention
    assert _flops(FLAVORS["70B"], 8192) == 6 * (70_553_706_496 - 1_050_673_152) + 32_212_254_720


def test_flops_of_405b_by_hand() -> None:
    layer = 2 * 16_384 * 16_384 + 2 * 16_384 * 1024 + 3 * 16_384 * 53_248 + 2 * 16_384
    multiplied = 126 * layer + 16_384 + 128_256 * 16_384
    attention = 3 * (2 * 16_384 * 8192 + 2 * 16_384 * 8192) // 2
    assert _flops(FLAVORS["405B"], 8192) == 6 * multiplied + 126 * attention
    assert _flops(FLAVORS["405B"], 8192) == 6 * (405_853_388_800 - 2_101_346_304) + 101_468_602_368


def test_a_tied_embedding_multiplies_too() -> None:
    args = FLAVORS["1B"]
    assert _flops(args, 4096) == 6 * 1_235_814_400 + 6 * 16 * 2048 * 4096
    untied = replace(args, tied=False)
    assert untied.parameter_count() == args.parameter_count() + 128_256 * 2048
    assert _flops(untied, 4096) == _flops(args, 4096)


def test_flops_of_attention_grow_with_the_sequence() -> None:
    args = FLAVORS["8B"]
    one, two, four = (_flops(args, length) for length in (1024, 2048, 4096))
    assert two - one == 6 * 32 * 4096 * 1024
    assert four - two == 2 * (two - one)


def test_published_shapes() -> None:
    for flavor in PUBLISHED:
        args = FLAVORS[flavor]
        assert (args.vocab_size, args.max_seq_len, args.rope_theta) == (128_256, 131_072, 500_000.0), flavor
        assert args.n_kv_heads == 8
        assert args.head_dim == (64 if flavor == "1B" else 128)
        assert args.tied == (flavor in ("1B", "3B"))
        assert args.rope_scaling is not None
        assert args.rope_scaling.factor == (32.0 if flavor in ("1B", "3B") else 8.0)


def test_the_flavor_for_256k_tokens_turns_its_slowest_channel_as_far_as_the_published_one() -> None:
    short, long = FLAVORS["405B"], FLAVORS["405B-256K"]
    assert replace(long, max_seq_len=short.max_seq_len, rope_scaling=short.rope_scaling) == short
    angles = [
        rope_table(torch.tensor([args.max_seq_len]), args.head_dim, args.rope_theta, args.rope_scaling)[:, 0, 0, 63]
        for args in (short, long)
    ]
    assert torch.allclose(*angles, atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "n_heads", "n_kv_heads"),
    [
        (10, 4, 4),  # heads do not divide the width
        (12, 4, 3),  # key heads do not divide the query heads
        (12, 4, 4),  # heads of 3 channels cannot be rotated in pairs
    ],
)
def test_a_shape_that_cannot_be_is_refused(dim: int, n_heads: int, n_kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"n_heads {n_heads} must divide dim {dim} into an even head size"):
        Llama3Args(dim, 1, n_heads, n_kv_heads, 16)
