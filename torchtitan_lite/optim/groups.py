"""Which settings each parameter is stepped with: the recipe's, or those of the first group whose pattern matches."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from torchtitan_lite.config.optimizing import Optimizer, ParamGroup
from torchtitan_lite.errors import UserError

_KEY = "optimizer.param_groups"


@dataclass(frozen=True)
class Settings:
    """Of a group of parameters; lr_factor: times the rate of the schedule."""

    lr_factor: float
    weight_decay: float
    beta1: float
    beta2: float


def settings_of(name: str, config: Optimizer) -> Settings:
    """The settings of the parameter of that name."""
    decays = not any(fnmatchcase(name, pattern) for pattern in config.weight_decay_exclude)
    first = _first_match(name, config.param_groups)
    group = ParamGroup() if first is None else config.param_groups[first]

    def own(value: float, otherwise: float) -> float:
        return otherwise if value == -1 else value

    return Settings(
        group.lr_factor,
        own(group.weight_decay, config.weight_decay if decays else 0.0),
        own(group.beta1, config.beta1),
        own(group.beta2, config.beta2),
    )


def require_groups(model: nn.Module, config: Optimizer) -> None:
    """Raise UserError where a group is of no parameter of the whole `model`."""
    names = [name for name, _ in model.named_parameters()]
    firsts = {_first_match(name, config.param_groups) for name in names}
    for index, group in enumerate(config.param_groups):
        if index in firsts:
            continue
        where, matched = f'{_KEY}[{index}].pattern = "{group.pattern}"', _matched(names, group)
        if matched:
            raise UserError(f"{where}: groups before it take all that it matches, {matched[0]} first; move it up")
        raise UserError(f"{where} matches no parameter; some are {', '.join(names[:4])}")


def _first_match(name: str, groups: Sequence[ParamGroup]) -> int | None:
    return next((index for index, group in enumerate(groups) if fnmatchcase(name, group.pattern)), None)


def _matched(names: Sequence[str], group: ParamGroup) -> list[str]:
    return [name for name in names if fnmatchcase(name, group.pattern)]
