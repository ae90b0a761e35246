"""What follows from the shape of a dense decoder: parameters, FLOPs, first values, plan. No torch.

The families that are built from common.decoder share all of it.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from torchtitan_lite.distributed.plans import ContextPlan, ParallelPlan, TensorPlan, TensorStyle
from torchtitan_lite.models.common.rope_scaling import RopeScaling
from torchtitan_lite.models.spec import Init


class DecoderShape(Protocol):
    """dim: width. n_heads, n_kv_heads: query heads and the key/value heads they share (GQA), each of head_dim.
    ffn_dim: width inside SwiGLU. tied: the output matrix is the embedding. qk_norm: queries and keys are normed."""

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


def parameter_count(shape: DecoderShape) -> int:
    """Elements of all parameters; a tied output counts once."""
    embeddings = shape.vocab_size * shape.dim * (1 if shape.tied else 2)
    return embeddings + shape.n_layers * _layer_parameters(shape) + shape.dim


def flops_by_module(shape: DecoderShape, seq_len: int) -> dict[str, float]:
    """FLOPs of forward and backward for one token of a causal sequence of `seq_len`, by top-level module in the
    order of the forward pass.

    6 for each parameter that multiplies a token (Kaplan et al., arXiv:2001.08361); the embedding is looked up.
    Attention: scores and values are 2 x 2 x heads x head_dim x seq_len forward, three times that with the
    backward, half of it causal.
    """
    layer = 6.0 * _layer_parameters(shape) + 6 * shape.n_heads * shape.head_dim * seq_len
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
    if parts[-2] in ("wo", "w2", "w3"):
        layer = int(parts[1])
        return Init(std=0.02 / math.sqrt(2 * (layer + 1)))
    return Init(std=0.02)


def plan(shape: DecoderShape) -> ParallelPlan:
    """Every technique; a tied model has no pipeline."""
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
                "ffn_dim": shape.ffn_dim,
                "vocab_size": shape.vocab_size,
            },
        ),
        context=ContextPlan("layers.*.attention.core", shape.n_heads, shape.n_kv_heads),
        stages=not shape.tied,
        without={"pipeline": "its output matrix is its embedding, which first and last stage would both need"}
        if shape.tied
        else {},
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
        "layers.*.feed_forward": "gather",
        "layers.*.feed_forward.w1": "columns",
        "layers.*.feed_forward.w3": "columns",
        "layers.*.feed_forward.w2": "rows",
        "norm": "sequence",
        "output": "tied_output" if shape.tied else "output",
    }
    if shape.qk_norm:
        styles |= {"layers.*.attention.q_norm": "head_norm", "layers.*.attention.k_norm": "head_norm"}
    return styles


def _layer_parameters(shape: DecoderShape) -> int:
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    attention = 2 * shape.dim * q_dim + 2 * shape.dim * kv_dim + (2 * shape.head_dim if shape.qk_norm else 0)
    return attention + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
