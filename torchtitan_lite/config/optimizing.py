"""Settings of the optimizer and its learning rate; the rest of the schema is in schema.py."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_lite.config.setting import setting


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with settings of their own, a table for each group; the first whose pattern matches counts. A table of
    the list: `[[optimizer.param_groups]]`."""

    pattern: str = ""
    """Pattern (fnmatch) of parameter names, as in `tok_embeddings.*`."""

    optimizer_name: Literal["", "AdamW", "Muon"] = ""
    """Optimizer of these parameters. Empty: as without the group."""

    lr_factor: float = setting(1.0, minimum=0.0)
    """Times the learning rate of the schedule."""

    weight_decay: float = setting(-1.0, minimum=0.0, auto=-1)
    """Decoupled weight decay. -1: as without the group."""

    beta1: float = setting(-1.0, minimum=0.0, below=1.0, auto=-1)
    """AdamW's. -1: as without the group."""

    beta2: float = setting(-1.0, minimum=0.0, below=1.0, auto=-1)
    """AdamW's. -1: as without the group."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon, and settings by groups of parameters."""

    name: Literal["AdamW", "Muon"] = "AdamW"
    """`AdamW` (Loshchilov and Hutter, arXiv:1711.05101). `Muon` (arXiv:2502.16982) for the matrices of the blocks,
    experts' one by one, but for routers; AdamW for all other parameters."""

    lr: float = setting(8e-4, minimum=0.0)
    """Peak learning rate."""

    beta1: float = setting(0.9, minimum=0.0, below=1.0)
    """Decay of the mean of gradients."""

    beta2: float = setting(0.95, minimum=0.0, below=1.0)
    """Decay of the mean of squared gradients."""

    eps: float = setting(1e-8, above=0.0)
    """Added to the root of the second moment."""

    momentum: float = setting(0.95, minimum=0.0, below=1.0)
    """Muon's: decay of the mean of gradients, Nesterov's way."""

    ns_steps: int = setting(5, minimum=1, maximum=99)
    """Muon's: steps of the Newton-Schulz iteration that brings singular values near one."""

    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon's: by what the learning rate is multiplied for a matrix of R x C. `match_rms_adamw`: 0.2 sqrt(max(R, C)),
    so that lr and weight_decay are AdamW's. `original`: sqrt(max(1, R / C))."""

    weight_decay: float = setting(0.1, minimum=0.0)
    """Decoupled weight decay of the parameters not excluded."""

    weight_decay_exclude: list[str] = field(default_factory=lambda: ["*norm*", "*.bias"])
    """Patterns (fnmatch) of parameter names that do not decay; `[]` decays all."""

    param_groups: list[ParamGroup] = field(default_factory=list)
    """Parameters with settings of their own, see [[optimizer.param_groups]]."""

    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type in which moments and momentum are kept; steps are computed in float32. `bfloat16`: rounded to the nearest,
    half the memory. `int8`: in blocks with a scale each (arXiv:2110.02861), with torchao's values, a quarter."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """AdamW's. `fused`: one kernel. `foreach`: one call per operation for all parameters. `for-loop`: one call per
    operation and parameter."""


@dataclass(frozen=True)
class LRScheduler:
    """Warm-up, stable part and decay (WSD, arXiv:2404.06395)."""

    warmup_steps: int = setting(200, minimum=0)
    """Steps over which the learning rate rises linearly to its peak."""

    total_steps: int = setting(-1, minimum=1, auto=-1)
    """Length of the schedule. -1: training.steps."""

    decay_ratio: float = setting(-1.0, minimum=0.0, maximum=1.0, auto=-1)
    """Part of the schedule that decays, at its end. -1: all that follows the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = setting(0.0, minimum=0.0, maximum=1.0)
    """Floor of the decay, as a part of the peak."""
