"""AdamW over groups of parameters: those that decay and those that do not, those of one mesh at a time."""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan_lite.config.schema import Optimizer


def build_optimizer(config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW over named parameters; its learning rate is set each step from the schedule."""
    # One kernel for all takes parameters of one mesh only, and experts are on another.
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        decays = not any(fnmatchcase(name, pattern) for pattern in config.weight_decay_exclude)
        groups[decays, parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), members in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
