"""What a model declares about itself so that techniques can attach: tables of module names. No torch.

A pattern is a module's dotted name with `*` for one part of it: `layers.*.attention.wq`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torchtitan_lite.config.techniques import ActivationCheckpoint

# How a module's parameters and activations lie over the ranks of the tensor axis; what each does stands in
# distributed/tensor_parallel.py. Between blocks the hidden states are split along the sequence.
TensorStyle = Literal[
    "embedding",
    "sequence",
    "gather",
    "columns",
    "rows",
    "head_norm",
    "output",
    "tied_output",
    "local",
    "replicated",
    "apart",
]


@dataclass(frozen=True)
class TensorPlan:
    """styles: pattern to style; every parameter of the model must be of a module that has one, but for those of a
    mixture's router and experts, which need none.
    divides: sizes, by their names, that the tensor-parallel degree must divide."""

    styles: Mapping[str, TensorStyle]
    divides: Mapping[str, int]


@dataclass(frozen=True)
class ContextPlan:
    """attention: pattern of the modules that map (q [B, L, H, E], k and v [B, L, K, E], mask) to [B, L, H, E].
    heads, kv_heads: H and K of the whole model."""

    attention: str
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class ExpertPlan:
    """moe: pattern of the models.common.moe.MoE. num_experts, top_k: of each of them."""

    moe: str
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class ParallelPlan:
    """Where techniques attach.

    fsdp_units: groups of modules whose parameters are gathered together, in the order of the forward pass.
    `layers.*`, alone in its group, gives a group for each child of `layers`. Parameters of no group belong to the
    model as a whole.
    stages: whether the model can be cut into pipeline stages: its top-level modules may be None, and it runs those
    that are there (the units of a cut are the keys of ModelArgs.flops_by_module).
    head: the top-level module that maps hidden states to logits, where the model's forward takes `labels` and hands
    them on to it: what takes its place gives the loss and no logits. Its `weight` is the matrix; it has none where a
    forward hands that to it too. None where the model has no such module.
    without: technique (tensor, context, expert, pipeline) to the reason why this model has no plan for it.
    """

    fsdp_units: tuple[tuple[str, ...], ...]
    tensor: TensorPlan | None = None
    context: ContextPlan | None = None
    experts: ExpertPlan | None = None
    stages: bool = False
    head: str | None = None
    without: Mapping[str, str] = field(default_factory=dict)

    def head_in_loss(self, loss_chunks: int) -> str | None:
        """The head, where training.loss_chunks makes it one with the loss."""
        return self.head if loss_chunks > 1 else None


# What a block keeps of its forward: all that its backward needs, the results of some operations, or its input alone.
Keeps = Literal["all", "op", "input"]


@dataclass(frozen=True)
class Saving:
    """What decides how much a block keeps.

    keeps: see Keeps. width: bytes of an activation. exchanges_heads: whether context parallelism does. fused_norms:
    whether a norm is one operation, as on CUDA. recomputed: as per_op_sac_force_recompute_mm_shapes_by_fqns.
    """

    keeps: Keeps
    width: int
    fused_norms: bool
    tp: int = 1
    cp: int = 1
    ep: int = 1
    exchanges_heads: bool = False
    recomputed: tuple[str, ...] = ()


def keeps(section: ActivationCheckpoint, block: int) -> Keeps:
    """What the block at that place in the whole model keeps; within a memory budget, what it keeps at most."""
    if section.mode in ("none", "memory_budget"):
        return "all"
    if section.mode == "selective" and section.selective_ac_option == "op":
        return "op"
    every = 1 if section.mode == "full" else int(section.selective_ac_option)
    return "input" if (block + 1) % every == 0 else "all"


def mixture_styles(plan: ExpertPlan) -> dict[str, TensorStyle]:
    """How a mixture lies under tensor parallelism, in any model. A rank routes its part of the sequence, which needs no
    gathering; to the experts its tokens are other tokens."""
    return {plan.moe: "local", f"{plan.moe}.router": "replicated", f"{plan.moe}.experts": "apart"}


def capacity(factor: float, seq_len: int, top_k: int, num_experts: int) -> int:
    """The most tokens of a sample that an expert takes: `factor` times its even share, rounded down."""
    return int(factor * seq_len * top_k / num_experts)
