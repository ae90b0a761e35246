"""Which optimizer and settings a parameter is stepped with: the recipe's, or those of the first group that matches."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NoReturn

from torch import nn

from torchtitan_lite.config.optimizing import Optimizer, ParamGroup
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.distributed.units import matches
from torchtitan_lite.errors import UserError

_KEY = "optimizer.param_groups"


@dataclass(frozen=True)
class Settings:
    """Of a group of parameters; lr_factor: times the rate of the schedule. beta1, beta2: AdamW's."""

    optimizer: Literal["AdamW", "Muon"]
    lr_factor: float
    weight_decay: float
    beta1: float
    beta2: float


def settings_of(name: str, dims: int, config: Optimizer, experts: ExpertPlan | None) -> Settings:
    """The settings of the parameter of that name, with so many dims. experts: of the model."""
    decays = not any(fnmatchcase(name, pattern) for pattern in config.weight_decay_exclude)
    first = _first_match(name, config.param_groups)
    group = ParamGroup() if first is None else config.param_groups[first]

    def own(value: float, otherwise: float) -> float:
        return otherwise if value == -1 else value

    usual: Literal["AdamW", "Muon"] = "AdamW"
    if config.name == "Muon" and _in_a_block(name, experts) and _are_matrices(name, dims, experts):
        usual = "Muon"
    return Settings(
        group.optimizer_name or usual,
        group.lr_factor,
        own(group.weight_decay, config.weight_decay if decays else 0.0),
        own(group.beta1, config.beta1),
        own(group.beta2, config.beta2),
    )


def require_groups(model: nn.Module, config: Optimizer, experts: ExpertPlan | None) -> None:
    """Raise UserError where a group is of no parameter of the whole `model`, or Muon is to take what it cannot."""
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    firsts = {name: _first_match(name, config.param_groups) for name in dims}
    settings = {name: settings_of(name, dims[name], config, experts) for name in dims}
    for index, group in enumerate(config.param_groups):
        members = [name for name in dims if firsts[name] == index]
        if not members:
            _refuse_empty(index, group, list(dims))
        kinds = {settings[name].optimizer for name in members}
        for key in ("beta1", "beta2"):
            if getattr(group, key) != -1 and "AdamW" not in kinds:
                raise UserError(
                    f"{_KEY}[{index}].{key} = {getattr(group, key)} is AdamW's, and Muon has all that "
                    f'"{group.pattern}" matches, {members[0]} first; remove it, or set optimizer_name = "AdamW"'
                )
    for name, each in settings.items():
        if each.optimizer == "Muon" and not _are_matrices(name, dims[name], experts):
            raise UserError(
                f'{_KEY}[{firsts[name]}].optimizer_name = "Muon": Muon takes matrices, and {name} has {dims[name]} '
                'dims; narrow the pattern, or leave it to "AdamW"'
            )
    if config.name == "Muon" and not any(each.optimizer == "Muon" for each in settings.values()):
        raise UserError(
            'optimizer.name = "Muon" takes the matrices of numbered blocks, as in layers.0, and finds none; name '
            f'parameters in a group with optimizer_name = "Muon", or set "AdamW"; some are {_some(list(dims))}'
        )


def _refuse_empty(index: int, group: ParamGroup, names: Sequence[str]) -> NoReturn:
    where = f'{_KEY}[{index}].pattern = "{group.pattern}"'
    if matched := [name for name in names if fnmatchcase(name, group.pattern)]:
        raise UserError(f"{where}: groups before it take all that it matches, {matched[0]} first; move it up")
    raise UserError(f"{where} matches no parameter; some are {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4])


def _first_match(name: str, groups: Sequence[ParamGroup]) -> int | None:
    return next((index for index, group in enumerate(groups) if fnmatchcase(name, group.pattern)), None)


def _in_a_block(name: str, experts: ExpertPlan | None) -> bool:
    """And of no router, whose rows are experts' keys, as the rows of an embedding are tokens'."""
    module = name.rpartition(".")[0]
    routes = experts is not None and matches(module, f"{experts.moe}.router")
    return not routes and any(part.isdigit() for part in name.split("."))


def _are_matrices(name: str, dims: int, experts: ExpertPlan | None) -> bool:
    """Whether a parameter is one, or experts' in a stack."""
    stacked = experts is not None and matches(name.rpartition(".")[0], f"{experts.moe}.experts")
    return dims == (3 if stacked else 2)
