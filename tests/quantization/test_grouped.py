"""Float8 of experts' products: by hand, padded, which experts, what is refused, how far the numbers move."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.test_moe import _nothing_in_the_tail
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import DEEP_LLAMA, MOE, write_recipe
from torchtitan_lite.config.techniques import GroupedFloat8
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.common.moe import Experts, GroupedSwiGLU
from torchtitan_lite.quantization.grouped import (
    EmulatedSwiGLU,
    ScaledSwiGLU,
    apply_grouped_float8,
    named_experts,
    padded_places,
    require_named_experts,
)

CPU = torch.device("cpu")
EXPERTS = ["experts"]
D, F_ = 32, 48
# Sizes of groups and rows past the last; one group without any, one of one row, one of several kernels' blocks.
SIZES, TAIL = [5, 0, 1, 40, 17], 6
E, R = len(SIZES), sum(SIZES) + TAIL


def _ends(sizes: list[int] = SIZES) -> Tensor:
    return torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def _inputs(tail: int = TAIL, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows, w1, w2, w3 as experts hand them on; of columns and rows of unlike sizes, so that each scale is another."""
    draw = torch.Generator().manual_seed(0)

    def uneven(*shape: int) -> Tensor:
        sizes = torch.randn(shape[:-1], generator=draw)[..., None] + torch.randn(shape[-1], generator=draw)
        return torch.randn(shape, generator=draw) * (3 * sizes).exp2()

    tensors = [uneven(sum(SIZES) + tail, D), *(uneven(E, *shape) / 64 for shape in ((F_, D), (D, F_), (F_, D)))]
    return [each.to(dtype).requires_grad_() for each in tensors]


def _computed(swiglu: Any, inputs: list[Tensor], ends: Tensor) -> list[Tensor]:
    """The output of the rows that are some expert's, and all gradients."""
    rows, *weights = inputs
    own = torch.arange(len(rows))[:, None] < ends[-1]
    out = swiglu(rows.where(own, 0.0), *(each.transpose(-2, -1) for each in weights), ends).where(own, 0.0)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def _rounded(x: Tensor, dim: int) -> Tensor:
    """To 4 bits of what is a power of two above the least that holds the largest number along `dim`, in float64."""
    assert x.dtype == torch.float64
    out = torch.zeros_like(x).movedim(dim, -1)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:-1])).reshape(-1, out.dim() - 1):
        vector = x.movedim(dim, -1)[tuple(index)]
        if (largest := float(vector.abs().max())) == 0:
            continue
        scale = 2.0 ** torch.tensor(448.0 / largest).log2().floor().item()
        exponent = (vector * scale).abs().clamp(min=2.0**-6).log2().floor()
        step = 2.0 ** (exponent - 3)  # three bits behind the first; below 2^-6 as far apart as there
        out[tuple(index)] = (vector * scale / step).round() * step / scale
    return out.movedim(-1, dim)


class _ByHand(torch.autograd.Function):
    """x [n, K] times w [N, K] transposed, each of three products from factors rounded along what it sums over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _rounded(x, 1) @ _rounded(w, 1).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return _rounded(grad, 1) @ _rounded(w, 0), _rounded(grad, 0).t() @ _rounded(x, 0)


def _loop(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ends: Tensor) -> Tensor:
    """Expert after expert."""
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        x = rows[start:end]
        if end > start:
            gate, up = (_ByHand.apply(x, w[expert].t()) for w in (w1, w3))
            x = _ByHand.apply(F.silu(gate) * up, w2[expert].t())
        parts.append(x)
        start = end
    return torch.cat([*parts, torch.zeros_like(rows[start:])])


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_a_product_is_that_of_experts_one_by_one_rounded_by_hand() -> None:
    """In float64, where no sum's last bit rounds to another float8."""
    inputs = [each.detach().double().requires_grad_() for each in _inputs()]
    expected = _computed(_loop, inputs, _ends())
    plain = _computed(GroupedSwiGLU(), _inputs(), _ends())
    found = _computed(EmulatedSwiGLU(), _inputs(), _ends())
    for name, near, exact, by_hand in zip(("out", "rows", "w1", "w2", "w3"), found, plain, expected, strict=True):
        assert _error(exact, by_hand) > 0.01, name  # the rounding shows
        assert _error(near, by_hand) < 2e-3, name
    # One product alone has no rounded sum in its way.
    x, w = _inputs()[0], _inputs()[1]
    one = EmulatedSwiGLU().product(x, w.transpose(-2, -1), _ends())[: R - TAIL]
    start, ends = 0, _ends().tolist()
    for expert, end in enumerate(ends):
        by_hand = _rounded(x[start:end].detach().double(), 1) @ _rounded(w[expert].detach().double(), 1).t()
        assert torch.allclose(one[start:end].double(), by_hand, rtol=1e-5, atol=1e-6 * float(by_hand.abs().max() if end > start else 0))
        start = end
