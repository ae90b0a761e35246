"""A model from outside in one file: GPT with learned positions, LayerNorm and GELU.

Train it from the project's root, without a change to the package:

    ./run_train.sh train_configs/llama3_debug.toml --model.spec=docs.examples.minimal_gpt:SPEC --model.flavor=small \
        --job.dump_folder=outputs/minimal_gpt
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.distributed.plans import ContextPlan, ParallelPlan, TensorPlan
from torchtitan_lite.models.common.layers import DotProductAttention
from torchtitan_lite.models.spec import Init, ModelSpec


@dataclass(frozen=True)
class GPTArgs:
    """Shape of the model. Everything that the system asks of a model's arguments is here."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 2048
    max_seq_len: int = 1024

    def parameter_count(self) -> int:
        layer = 12 * self.dim * self.dim + 12 * self.dim
        return self.n_layers * layer + (2 * self.vocab_size + self.max_seq_len + 2) * self.dim

    def flops_by_module(self, seq_len: int) -> dict[str, float]:
        """Of one token, forward and backward, in the order of the forward pass; a pipeline may cut between them."""
        block = 6.0 * (12 * self.dim * self.dim + 12 * self.dim) + 6 * self.dim * seq_len
        return {
            "tokens": 0.0,
            "positions": 0.0,
            **{f"blocks.{index}": block for index in range(self.n_layers)},
            "norm": 12.0 * self.dim,
            "output": 6.0 * self.vocab_size * self.dim,
        }


class Attention(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.q, self.v, self.projection = (nn.Linear(args.dim, args.dim) for _ in range(3))
        self.k = nn.Linear(args.dim, args.dim, bias=False)  # one would cancel in the softmax
        self.core = DotProductAttention()

    def forward(self, x: Tensor, *, mask: Tensor | None) -> Tensor:
        # -1: a tensor-parallel rank holds some of the heads.
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        return self.projection(self.core(q, k, v, mask).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(args.dim, 4 * args.dim), nn.Linear(4 * args.dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(args.dim), nn.LayerNorm(args.dim)
        self.attention, self.mlp = Attention(args), FeedForward(args)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, args: GPTArgs) -> None:
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.dim)
        self.positions = nn.Embedding(args.max_seq_len, args.dim)
        self.blocks = nn.ModuleDict({str(index): Block(args) for index in range(args.n_layers)})
        self.norm = nn.LayerNorm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, x: Tensor, positions_L: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits of tokens; on a pipeline stage the modules of other stages are None, and x is hidden states."""
        if self.tokens is not None:
            x = self.tokens(x)
        if self.positions is not None:
            assert positions_L is not None
            x = x + self.positions(positions_L[None])
        for block in self.blocks.values():
            x = block(x, mask)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.output is None else self.output(x)


def initial(name: str, args: GPTArgs) -> Init:
    """First values of a parameter; they depend on the seed and the name alone, whatever the mesh."""
    if name.endswith("bias"):
        return Init()
    if "norm" in name:
        return Init(mean=1.0)
    depth = (2 * args.n_layers) ** -0.5 if "projection" in name or "down" in name else 1.0
    return Init(std=0.02 * depth)


def plan(args: GPTArgs) -> ParallelPlan:
    """Where techniques attach: a table of names for each, and that is all they ask."""
    return ParallelPlan(
        fsdp_units=(("tokens", "positions"), ("blocks.*",), ("norm", "output")),
        tensor=TensorPlan(
            styles={
                "tokens": "embedding",
                "positions": "embedding",
                "blocks.*.*_norm": "sequence",
                "blocks.*.attention": "gather",
                "blocks.*.attention.[qkv]": "columns",
                "blocks.*.attention.projection": "rows",
                "blocks.*.mlp": "gather",
                "blocks.*.mlp.up": "columns",
                "blocks.*.mlp.down": "rows",
                "norm": "sequence",
                "output": "output",
            },
            divides={"n_heads": args.n_heads, "vocab_size": args.vocab_size, "max_seq_len": args.max_seq_len},
        ),
        context=ContextPlan("blocks.*.attention.core", args.n_heads, args.n_heads),
        stages=True,
    )


SPEC = ModelSpec("minimal_gpt", {"small": GPTArgs(dim=128, n_layers=4, n_heads=4)}, GPT, initial, plan)
