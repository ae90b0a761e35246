"""The optimizer of a run, over groups of parameters: those of the same settings, and of one mesh at a time."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan_lite.config.optimizing import Optimizer
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.optim.adamw import MOMENTS, KeptAdamW
from torchtitan_lite.optim.groups import Settings, settings_of
from torchtitan_lite.optim.muon import Muon
from torchtitan_lite.optim.states import Kept, State, sharded_zeros


class Joined(torch.optim.Optimizer):
    """Optimizers of different parameters as one: their groups and their state."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for member in members for group in member.param_groups], {"fused": False})
        self.members = members
        for member in members:
            member.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for member in self.members:
            member.step()

    def of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            member
            for member in self.members
            for group in member.param_groups
            if any(each is parameter for each in group["params"])
        )


def build_optimizer(
    config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], experts: ExpertPlan | None = None
) -> torch.optim.Optimizer:
    """The optimizer of named parameters; set_lr gives it the learning rate of each step. experts: of the model.

    Collective for Muon, see there.
    """
    parameters = list(parameters)
    kept = _kept(config, parameters)
    # One kernel for all takes parameters of one mesh only, and experts are on another.
    alike: dict[tuple[Settings, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        alike[settings_of(name, parameter.dim(), config, experts), mesh].append(parameter)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (settings, _), members in alike.items():
        groups[settings.optimizer].append(
            {
                "params": members,
                "lr_factor": settings.lr_factor,
                "weight_decay": settings.weight_decay,
                "betas": (settings.beta1, settings.beta2),
            }
        )
    made = [_BUILD[name](config, members, kept) for name, members in groups.items()]
    return made[0] if len(made) == 1 else Joined(made)


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its part of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def new_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> State:
    """The state of a parameter before its first step, as a step would make it."""
    if isinstance(optimizer, Joined):
        optimizer = optimizer.of(parameter)
    if isinstance(optimizer, (Muon, KeptAdamW)):
        return optimizer.new_state(parameter)
    moments = {key: sharded_zeros(parameter, parameter.dtype) for key in MOMENTS}
    fused = optimizer.defaults["fused"]
    return {"step": torch.zeros((), device=parameter.device if fused else "cpu"), **moments}


def _kept(config: Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]) -> Kept:
    if config.state_dtype != "int8":
        return Kept(getattr(torch, config.state_dtype))
    # Here: torchao takes a second to import.
    from torchtitan_lite.optim.int8_states import Int8, require_blocks

    require_blocks(parameters)
    return Int8()


def _adamw(config: Optimizer, groups: list[dict[str, Any]], kept: Kept) -> torch.optim.Optimizer:
    if config.state_dtype != "float32":
        return KeptAdamW(groups, lr=config.lr, eps=config.eps, implementation=config.implementation, kept=kept)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def _muon(config: Optimizer, groups: list[dict[str, Any]], kept: Kept) -> torch.optim.Optimizer:
    return Muon(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        ns_steps=config.ns_steps,
        adjust_lr_fn=config.adjust_lr_fn,
        kept=kept,
    )


_BUILD = {"AdamW": _adamw, "Muon": _muon}
