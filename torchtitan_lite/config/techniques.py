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
