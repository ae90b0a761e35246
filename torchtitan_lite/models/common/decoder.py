"""The decoder: embedding, pre-norm blocks of attention and SwiGLU or a mixture of them, norm, output.

Built on the meta device in a run; `assembly` spreads, materialises and initialises it.
"""

import torch
from torch import Tensor, nn

from torchtitan_lite.models.common.decoder_shape import DecoderShape
from torchtitan_lite.models.common.layers import Attention, Block, FeedForward, TiedOutput
from torchtitan_lite.models.common.rope import rope_table


class Decoder(nn.Module):
    """A whole decoder, or the part of it that a pipeline stage holds: the other modules are None then."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleDict({str(index): _block(shape) for index in range(shape.n_layers)})
        self.norm = nn.RMSNorm(shape.dim, shape.norm_eps)
        self.output = TiedOutput() if shape.tied else nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self._rope: tuple[Tensor, Tensor] | None = None  # positions and their table

    def forward(
        self,
        x: Tensor,
        positions_L: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        **routing: Tensor,
    ) -> Tensor:
        """Logits [B, L, vocab] of int64 tokens [B, L]; a pipeline stage takes and returns hidden states [B, L, D]
        where it has no embedding or no output.

        positions_L: int64 [L], where the tokens stand in their sequence; None is 0 ... L - 1. mask: as in
        DotProductAttention. labels: for an output that takes them and gives a loss (see ParallelPlan.head). routing:
        for mixtures of experts, weights_B as in MoE.
        """
        if positions_L is None:
            positions_L = torch.arange(x.shape[1], device=x.device)
        rope = self.rope(positions_L)
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for block in self.layers.values():
            x = block(x, rope, mask, **routing)
        if self.norm is not None:
            x = self.norm(x)
        tied = (self.tok_embeddings.weight,) if self.shape.tied else ()
        given = {} if labels is None else {"labels": labels}
        return x if self.output is None else self.output(x, *tied, **given)  # type: ignore[no-any-return]

    def rope(self, positions_L: Tensor) -> Tensor:
        """The rotary table of these positions, kept from call to call."""
        if self._rope is None or self._rope[0] is not positions_L:
            with torch.device(positions_L.device):
                table = rope_table(positions_L, self.shape.head_dim, self.shape.rope_theta, self.shape.rope_scaling)
            self._rope = (positions_L, table)
        return self._rope[1]


def _block(shape: DecoderShape) -> Block:
    eps = shape.norm_eps if shape.qk_norm else None
    attention = Attention(shape.dim, shape.n_heads, shape.n_kv_heads, shape.head_dim, eps)
    return Block(shape.dim, shape.norm_eps, attention, _feed_forward(shape))


def _feed_forward(shape: DecoderShape) -> nn.Module:
    if shape.moe is None:
        return FeedForward(shape.dim, shape.ffn_dim)
    from torchtitan_lite.models.common.moe import MoE

    return MoE(shape.dim, shape.ffn_dim, shape.moe)
