"""Blocks of the decoder families.

Shapes: B batch, L sequence, D dim, H query heads, K key/value heads, E head size. Under tensor parallelism H and K are
a rank's heads; between modules D-wide states then hold a rank's part of the sequence.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.models.common.rope import apply_rope


class DotProductAttention(nn.Module):
    """Causal attention; no parameters. A module of its own, so that context parallelism has something to wrap."""

    def forward(self, q_BLHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, H, E] from queries of L positions and keys of S. mask: bool [B, 1, L, S], causality included, True
        where a query sees a key; or a CausalBias of torch.nn.attention; None is causal, for L = S."""
        out_BHLE = F.scaled_dot_product_attention(
            q_BLHE.transpose(1, 2),
            k_BSKE.transpose(1, 2),
            v_BSKE.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_BLHE.shape[2] != k_BSKE.shape[2],
        )
        return out_BHLE.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245).

    qk_norm_eps: epsilon of an RMSNorm over each head's queries and keys (arXiv:2302.05442), None for no norm.
    """

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)
        self.core = DotProductAttention()
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x_BLD: Tensor, *, rope: Tensor, mask: Tensor | None) -> Tensor:
        # -1: under tensor parallelism a rank holds some of the heads.
        q_BLHE = self.q_norm(self.wq(x_BLD).unflatten(-1, (-1, self.head_dim)))
        k_BLKE = self.k_norm(self.wk(x_BLD).unflatten(-1, (-1, self.head_dim)))
        v_BLKE = self.wv(x_BLD).unflatten(-1, (-1, self.head_dim))
        out_BLHE = self.core(apply_rope(q_BLHE, rope), apply_rope(k_BLKE, rope), v_BLKE, mask)
        return self.wo(out_BLHE.flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, dense or a mixture of experts, each added to its input."""

    def __init__(self, dim: int, norm_eps: float, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x_BLD: Tensor, rope: Tensor, mask: Tensor | None, **routing: Tensor) -> Tensor:
        """routing: what a mixture takes beside hidden states."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope=rope, mask=mask)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD), **routing)  # type: ignore[no-any-return]


class TiedOutput(nn.Module):
    """An output matrix that another module owns: one parameter, one owner."""

    def forward(self, x_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BLD, weight_VD)
