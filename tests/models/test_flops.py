"""The FLOPs behind MFU against those that torch counts on the plain model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import DEEP_LLAMA, DEEP_QWEN
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.models.spec import ModelSpec

_ROWS, _SEQ_LEN = 2, 64


@pytest.mark.parametrize(
    ("spec", "flavor"),
    [(DEEP_LLAMA, "tied"), (DEEP_QWEN, "untied"), (LLAMA3, "debugmodel")],
    ids=["llama", "qwen", "debugmodel"],
)
def test_the_formula_counts_what_torch_counts(spec: ModelSpec, flavor: str) -> None:
    args = spec.flavors[flavor]
    model = spec.build(args)
    tokens = torch.randint(args.vocab_size, (_ROWS, _SEQ_LEN))
    # The other kernels are not counted on CPU.
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    # It multiplies all pairs of positions, where half of them are causal.
    other_half = args.n_layers * 6 * args.n_heads * args.head_dim * _SEQ_LEN
    expected = (sum(args.flops_by_module(_SEQ_LEN).values()) + other_half) * _ROWS * _SEQ_LEN
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.01)
