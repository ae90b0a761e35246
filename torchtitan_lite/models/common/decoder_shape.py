"""What follows from the shape of a decoder, dense or a mixture: parameters, FLOPs, first values, plan. No torch.

The families that are built from common.decoder share all of it.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from torchtitan_lite.distributed.plans import ContextPlan, ExpertPlan, ParallelPlan, TensorPlan, TensorStyle
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.common.rope_scaling import RopeScaling
from torchtitan_lite.models.spec import Init


class DecoderShape(Protocol):
    """dim: width. n_heads, n_kv_heads: query heads and the key/value heads they share (GQA), each of head_dim.
    ffn_dim: width inside SwiGLU, each expert's where there is a mixture. tied: the output matrix is the embedding.
    qk_norm: queries and keys are normed. moe: the mixture that every layer has in the place of its feed-forward."""

    @property
    def dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def moe(self) -> MoEShape | None: ...


def parameter_count(shape: DecoderShape) -> int:
    """Elements of all parameters; a tied output counts once."""
    return _parameters(shape, shape.moe.num_experts if shape.moe else 1)


def active_parameter_count(shape: DecoderShape) -> int:
    """Elements of the parameters that one token meets: of the experts, those that it goes to."""
    return _parameters(shape, shape.moe.top_k if shape.moe else 1)


def flops_by_module(shape: DecoderShape, seq_len: int) -> dict[str, float]:
    """FLOPs of forward and backward for one token of a causal sequence of `seq_len`, by top-level module in the
    order of the forward pass.

    6 for each parameter that multiplies a token (Kaplan et al., arXiv:2001.08361), so of a mixture's experts for
    those that the token goes to; the embedding is looked up.
    Attention: scores and values are 2 x 2 x heads x head_dim x seq_len forward, three times that with the
    backward, half of it causal.
    """
    active = shape.moe.top_k if shape.moe else 1
    layer = 6.0 * _layer_parameters(shape, active) + 6 * shape.n_heads * shape.head_dim * seq_len
    return {
        "tok_embeddings": 0.0,
        **{f"layers.{index}": layer for index in range(shape.n_layers)},
        "norm": 6.0 * shape.dim,
        "output": 6.0 * shape.vocab_size * shape.dim,
    }


def initial(name: str, shape: DecoderShape) -> Init:
    """TorchTitan's initialisation: normals of 0.02; wo, w2 and w3 scaled down by depth; an output matrix that
    starts with logits of unit variance."""
    parts = name.split(".")
    if "norm" in parts[-2]:
        return Init(mean=1.0)
    if parts[-2] == "tok_embeddings":
        return Init(std=shape.dim**-0.5, cutoff=3.0) if shape.tied else Init(std=1.0)
    if parts[-2] == "output":
        return Init(std=shape.dim**-0.5, cutoff=3.0)
    if not {"wo", "w2", "w3"}.isdisjoint(parts[-2:]):
        layer = int(parts[1])
        return Init(std=0.02 / math.sqrt(2 * (layer + 1)))
    return Init(std=0.02)


def plan(shape: DecoderShape) -> ParallelPlan:
    """Every technique; a tied model has no pipeline, a dense one no experts."""
    without = {} if shape.moe else {"expert": "it is dense"}
    if shape.tied:
        without["pipeline"] = "its output matrix is its embedding, which first and last stage would both need"
    # A tied embedding stays with the whole model, which uses it first and last.
    blocks: tuple[tuple[str, ...], ...] = (("layers.*",),)
    units = blocks if shape.tied else (("tok_embeddings",), *blocks, ("norm", "output"))
    return ParallelPlan(
        fsdp_units=units,
        tensor=TensorPlan(
            _tensor_styles(shape),
            {
                "n_heads": shape.n_heads,
                "n_kv_heads": shape.n_kv_heads,
                **({"ffn_dim": shape.ffn_dim} if shape.moe is None or shape.moe.num_shared_experts else {}),
                "vocab_size": shape.vocab_size,
            },
        ),
        context=ContextPlan("layers.*.attention.core", shape.n_heads, shape.n_kv_heads),
        experts=ExpertPlan("layers.*.feed_forward", shape.moe.num_experts, shape.moe.top_k) if shape.moe else None,
        stages=not shape.tied,
        head="output",
        without=without,
    )


def _tensor_styles(shape: DecoderShape) -> Mapping[str, TensorStyle]:
    styles: dict[str, TensorStyle] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention": "gather",
        "layers.*.attention.wq": "columns",
        "layers.*.attention.wk": "columns",
        "layers.*.attention.wv": "columns",
        "layers.*.attention.wo": "rows",
        "layers.*.ffn_norm": "sequence",
        "norm": "sequence",
        "output": "tied_output" if shape.tied else "output",
    }
    if shape.qk_norm:
        styles |= {"layers.*.attention.q_norm": "head_norm", "layers.*.attention.k_norm": "head_norm"}
    if shape.moe is None:
        return styles | _feed_forward_styles("layers.*.feed_forward")
    if shape.moe.num_shared_experts:
        styles |= _feed_forward_styles("layers.*.feed_forward.shared")
    return styles


def _feed_forward_styles(name: str) -> dict[str, TensorStyle]:
    return {name: "gather", f"{name}.w1": "columns", f"{name}.w3": "columns", f"{name}.w2": "rows"}


def _parameters(shape: DecoderShape, experts: int) -> int:
    embeddings = shape.vocab_size * shape.dim * (1 if shape.tied else 2)
    return embeddings + shape.n_layers * _layer_parameters(shape, experts) + shape.dim


def _layer_parameters(shape: DecoderShape, experts: int) -> int:
    """experts: how many of the routed ones count; a dense layer's feed-forward is one."""
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    attention = 2 * shape.dim * q_dim + 2 * shape.dim * kv_dim + (2 * shape.head_dim if shape.qk_norm else 0)
    router = 0
    if shape.moe is not None:
        router, experts = shape.dim * shape.moe.num_experts, experts + shape.moe.num_shared_experts
    return attention + router + experts * 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
