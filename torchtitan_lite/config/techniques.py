"""Settings of what trades memory, time and precision against each other; the rest of the schema is in schema.py."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_lite.config.setting import setting


@dataclass(frozen=True)
class ActivationCheckpoint:
    """What a block's forward leaves out of memory, to be computed again in its backward (arXiv:1604.06174)."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """`none`: everything is kept. `full`: of each block its input. `selective`: as `selective_ac_option` says.
    `memory_budget`: what the compiler finds worth it within `memory_budget`; needs compile.enable."""

    selective_ac_option: str = "2"
    """`op`: in each block the results of every second matrix product, of attention and of collectives are kept
    (arXiv:2205.05198), the rest is computed again. A number n: every n-th block as with `full`, the others as with
    `none`."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=list)
    """With `op`: modules by the end of their names, as in `feed_forward.w2`; matrix products with a weight of the same
    shape as one of theirs are computed again, and count for nothing among every second. A mixture's routers always
    are."""

    memory_budget: float = setting(0.5, minimum=0.0, maximum=1.0)
    """With `memory_budget`: the part of what `none` keeps that may be kept; 0 keeps as little as `full`."""


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile what `components` names."""

    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """`model`: each block; one graph serves all that are alike. `loss`: the cross-entropy."""

    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Compiler of the graphs; `aot_eager` and `eager` trace and run them without one."""


@dataclass(frozen=True)
class Float8:
    """Matrix products of linear layers in float8, through torchao; `model.converters` asks for it."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """What has a scale of its own: `tensorwise` each tensor, `rowwise` each of its rows; `rowwise_with_gw_hp` computes
    gradients of weights in full precision."""

    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers weights in float8: half the bytes of bfloat16. With `tensorwise`."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Scales of all weights in one all-reduce after the step, instead of one for each gather."""

    filter_fqns: list[str] = field(default_factory=list)
    """Layers that stay as they are: parts of their names, as in `output`. `auto_filter_small`: those that torchao
    knows to be too small to gain."""

    emulate: bool = False
    """Round to float8 and multiply in full precision: for hardware without float8. Slower than without."""


@dataclass(frozen=True)
class LinearLayers:
    """What is done to linear layers."""

    float8: Float8 = field(default_factory=Float8)


@dataclass(frozen=True)
class GroupedFloat8:
    """Matrix products of experts in float8, a scale for each row; `model.converters` asks for it. On CUDA (compute
    capability 9.0) through torchao, in bfloat16."""

    fqns: list[str] = field(default_factory=list)
    """Experts whose products are in float8: parts of their modules' names, as in `experts` for all of them."""

    emulate: bool = False
    """Round to float8 and multiply in full precision: for hardware without such products. Slower than without."""


@dataclass(frozen=True)
class GroupedProducts:
    """What is done to the products of experts."""

    float8: GroupedFloat8 = field(default_factory=GroupedFloat8)


@dataclass(frozen=True)
class Quantize:
    """Products in lower precision."""

    linear: LinearLayers = field(default_factory=LinearLayers)
    grouped_mm: GroupedProducts = field(default_factory=GroupedProducts)
