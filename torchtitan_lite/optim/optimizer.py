"""AdamW over two groups: parameters that decay and those that do not."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from torchtitan_lite.config.schema import Optimizer


def build_optimizer(config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW over named parameters; its learning rate is set each step from the schedule."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters:
        decays = not any(fnmatchcase(name, pattern) for pattern in config.weight_decay_exclude)
        groups[decays].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, members in groups.items()
            if members
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
