"""The Llama 3 module: embedding, pre-norm blocks of attention and SwiGLU, norm, output.

Built on the meta device in a run; `assembly` materialises and initialises it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.models.common.layers import Attention, FeedForward
from torchtitan_lite.models.common.rope import rope_table
from torchtitan_lite.models.llama3.args import Llama3Args


class Block(nn.Module):
    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args.dim, args.n_heads, args.n_kv_heads, args.head_dim)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)

    def forward(self, x_BLD: Tensor, rope: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))  # type: ignore[no-any-return]


class Llama3(nn.Module):
    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(index): Block(args) for index in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        # Tied, the embedding's weight is used again instead of a second name for it: one parameter, one owner.
        self.output = None if args.tied else nn.Linear(args.dim, args.vocab_size, bias=False)
        self._rope: Tensor | None = None

    def rope(self, seq_len: int, device: torch.device) -> Tensor:
        """The rotary table for `seq_len` positions, kept from call to call."""
        if self._rope is None or self._rope.shape[1] != seq_len or self._rope.device != device:
            with torch.device(device):
                self._rope = rope_table(seq_len, self.args.head_dim, self.args.rope_theta, self.args.rope_scaling)
        return self._rope

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of int64 tokens [batch, seq]."""
        rope = self.rope(tokens_BL.shape[1], tokens_BL.device)
        x_BLD = self.tok_embeddings(tokens_BL)
        for block in self.layers.values():
            x_BLD = block(x_BLD, rope)
        x_BLD = self.norm(x_BLD)
        return F.linear(x_BLD, self.tok_embeddings.weight) if self.output is None else self.output(x_BLD)
