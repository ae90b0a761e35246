"""A model from outside in one file: GPT with learned positions, LayerNorm and GELU.

Train it from the project's root, without a change to the package:

    ./run_train.sh train_configs/llama3_debug.toml --model.spec=docs.examples.minimal_gpt:SPEC --model.flavor=small \
        --job.dump_folder=outputs/minimal_gpt
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.models.spec import Init, ModelSpec, ParallelPlan


@dataclass(frozen=True)
class GPTArgs:
    """Shape of the model. Everything that the system asks of a model's arguments is here."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 2048
    max_seq_len: int = 1024

    def parameter_count(self) -> int:
        layer = 12 * self.dim * self.dim + 13 * self.dim
        return self.n_layers * layer + (2 * self.vocab_size + self.max_seq_len + 2) * self.dim

    def flops_per_token(self, seq_len: int) -> float:
        looked_up = (self.vocab_size + self.max_seq_len) * self.dim
        return 6 * (self.parameter_count() - looked_up) + 6 * self.n_layers * self.dim * seq_len


class Block(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.n_heads = args.n_heads
        self.attention_norm = nn.LayerNorm(args.dim)
        self.qkv = nn.Linear(args.dim, 3 * args.dim)
        self.projection = nn.Linear(args.dim, args.dim)
        self.mlp_norm = nn.LayerNorm(args.dim)
        self.up = nn.Linear(args.dim, 4 * args.dim)
        self.down = nn.Linear(4 * args.dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.dim)
        self.positions = nn.Embedding(args.max_seq_len, args.dim)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = nn.LayerNorm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of int64 tokens [batch, seq]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def initial(name: str, args: GPTArgs) -> Init:
    """First values of a parameter; they depend on the seed and the name alone, whatever the mesh."""
    if name.endswith("bias"):
        return Init()
    if "norm" in name:
        return Init(mean=1.0)
    depth = (2 * args.n_layers) ** -0.5 if "projection" in name or "down" in name else 1.0
    return Init(std=0.02 * depth)


def plan(args: GPTArgs) -> ParallelPlan:
    """Where data parallelism attaches: one unit a block, head and embeddings each together."""
    return ParallelPlan(fsdp_units=(("tokens", "positions"), ("blocks.*",), ("norm", "output")))


SPEC = ModelSpec("minimal_gpt", {"small": GPTArgs(dim=128, n_layers=4, n_heads=4)}, GPT, initial, plan)
