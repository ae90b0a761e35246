"""Rotary position embedding (Su et al., arXiv:2104.09864), with the scaling of Llama 3.1.

Channels are paired half against half (i with i + head_dim / 2), the order of Hugging Face weights; the
weights of Meta's own release pair neighbours, the same model under a permutation of wq and wk rows.
"""

import math

import torch
from torch import Tensor

from torchtitan_lite.models.common.rope_scaling import RopeScaling


def rope_table(positions_L: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Cosines and signed sines at int64 positions: float32 [2, L, 1, head_dim], on the current device."""
    # float64: at position 131071 a float32 angle is off by 0.004 rad.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = torch.outer(positions_L.to(torch.float64), frequencies)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
    return table.to(torch.float32).unsqueeze(2)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [batch, seq, heads, head_dim] by its positions; `table` as from rope_table."""
    cos, signed_sin = table.unbind(0)
    # roll by half swaps the halves; the sign sits in the table. float32 whatever x is: bfloat16 holds
    # an angle's cosine to 3 digits only.
    wide = x.to(torch.float32)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), signed_sin).to(x.dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_seq_len / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((ratio - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)
