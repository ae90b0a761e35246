"""AdamW over groups of parameters: those of the same settings, and of one mesh at a time."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan_lite.config.schema import Optimizer
from torchtitan_lite.optim.groups import Settings, settings_of


def build_optimizer(config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer of named parameters; set_lr gives it the learning rate of each step."""
    # One kernel for all takes parameters of one mesh only, and experts are on another.
    groups: dict[tuple[Settings, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[settings_of(name, config), mesh].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr_factor": settings.lr_factor,
                "weight_decay": settings.weight_decay,
                "betas": (settings.beta1, settings.beta2),
            }
            for (settings, _), members in groups.items()
        ],
        lr=config.lr,
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its part of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
