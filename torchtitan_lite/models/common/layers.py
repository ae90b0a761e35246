"""Attention and feed-forward of the dense decoder families.

Shapes: B batch, L sequence, D dim, H query heads, K key/value heads, E head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.models.common.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245)."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grouped = n_kv_heads != n_heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x_BLD: Tensor, rope: Tensor) -> Tensor:
        # -1: under tensor parallelism a rank holds some of the heads.
        q_BLHE = self.wq(x_BLD).unflatten(-1, (-1, self.head_dim))
        k_BLKE = self.wk(x_BLD).unflatten(-1, (-1, self.head_dim))
        v_BLKE = self.wv(x_BLD).unflatten(-1, (-1, self.head_dim))
        out_BHLE = F.scaled_dot_product_attention(
            apply_rope(q_BLHE, rope).transpose(1, 2),
            apply_rope(k_BLKE, rope).transpose(1, 2),
            v_BLKE.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.grouped,
        )
        return self.wo(out_BHLE.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD))  # type: ignore[no-any-return]
