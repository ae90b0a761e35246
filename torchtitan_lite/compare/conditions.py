"""`--assert "B.loss ≈ A.loss"`: conditions that a comparison must meet, for CI. No torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan_lite.errors import UserError

# Names that a condition may use, and the key of a side's summary.
METRICS = {
    "loss": "loss",
    "validation_loss": "validation_loss",
    "tps": "tps",
    "step_time_s": "step_time_s",
    "first_step_s": "first_step_s",
    "compile_s": "compile_s",
    "data_time_s": "data_time_s",
    "mfu": "mfu",
    "memory": "memory_peak_gib",
}
_JUDGED = {"loss": "loss", "tps": "speed", "step_time_s": "speed"}
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_ALIKE = ("≈", "~=", "==")
_NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_SIDE = r"([A-Z]+)\.(\w+)"
_CONDITION = re.compile(rf"\s*{_SIDE}\s*(≈|~=|==|<=|>=|<|>)\s*(?:(?:({_NUMBER})\s*\*\s*)?{_SIDE}|({_NUMBER}))\s*$")
_FORM = '"B.loss ≈ A.loss", "B.tps >= 0.95 * A.tps" or "B.memory < 70"'


@dataclass(frozen=True)
class Condition:
    """left operator factor x right, or left operator number."""

    text: str
    left: tuple[str, str]
    operator: str
    factor: float | None
    right: tuple[str, str] | None
    number: float | None

    @property
    def sides(self) -> tuple[str, str] | None:
        """Those whose verdict it asks for: without a factor, what is more than noise counts."""
        judged = self.right is not None and self.factor is None and self.left[1] in _JUDGED
        return (self.right[0], self.left[0]) if judged and self.right else None


def parse(text: str) -> Condition:
    """Raises UserError for what is no condition."""
    found = _CONDITION.match(text)
    if found is None:
        raise UserError(f'--assert "{text}": is no condition; write one as in {_FORM}')
    a, x, operator, factor, b, y, number = found.groups()
    right = (b, y) if b and y else None
    for metric in filter(None, (x, y)):
        if metric not in METRICS:
            raise UserError(f'--assert "{text}": no metric {metric}; there are: {", ".join(METRICS)}')
    if y is not None and x != y:
        raise UserError(f'--assert "{text}": {x} and {y} are different things; compare one of them')
    if operator in _ALIKE and (x not in _JUDGED or factor or number):
        raise UserError(
            f'--assert "{text}": {operator} is for {", ".join(_JUDGED)} of two sides, where noise is known; use < or >'
        )
    if a == b:
        raise UserError(f'--assert "{text}": compares {a} with itself')
    return Condition(
        text,
        (a, x),
        operator,
        float(factor) if factor else None,
        right,
        float(number) if number else None,
    )


def require_sides(conditions: list[Condition], names: list[str]) -> None:
    """Raise UserError where a condition names a side that there is not."""
    for each in conditions:
        for side in (each.left[0], *([each.right[0]] if each.right else [])):
            if side not in names:
                raise UserError(f'--assert "{each.text}": there is no side {side}; there are: {", ".join(names)}')


def judge(
    condition: Condition, summaries: Mapping[str, Mapping[str, Any]], pair: Mapping[str, Any] | None
) -> dict[str, Any]:
    """{condition, holds, told}. summaries: by side. pair: the verdicts of its second side over its first, where it asks
    for them (see Condition.sides); None where they have none."""
    judged = condition.sides and (pair is None or _is_judged(condition.left[1], pair))
    holds, told = _judged(condition, pair) if judged else _counted(condition, summaries)
    return {"condition": condition.text, "holds": holds, "told": told}


def _is_judged(metric: str, pair: Mapping[str, Any]) -> bool:
    """Whether a verdict on the pair is one on the metric: that on speed is of all ranks' tokens/s."""
    if metric == "loss":
        return True
    return bool(pair["comparable"]["tokens_per_step"]) and (
        metric == "step_time_s" or "world_size" not in pair["derived_diff"]
    )


def _judged(condition: Condition, pair: Mapping[str, Any] | None) -> tuple[bool, str]:
    if pair is None:
        return False, "a side has no finished run"
    metric = condition.left[1]
    part = pair[_JUDGED[metric]]
    verdict, told = part["verdict"], part["told"]
    if verdict == "not comparable" or (verdict == "different" and part["gap"] is None):
        return False, f"{verdict}: {told}"
    alike = verdict in ("equal", "no difference shown")
    if condition.operator in _ALIKE:
        return alike, f"{verdict}: {told}"
    if metric == "loss":
        higher = not alike and part["gap"] > 0
    else:
        higher = verdict == ("faster" if metric == "tps" else "slower")
    lower = not alike and not higher
    holds = {"<": lower, ">": higher, "<=": not higher, ">=": not lower}[condition.operator]
    return holds, f"{verdict}: {told}"


def _counted(condition: Condition, summaries: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
    def of(side: str, metric: str) -> float | None:
        return summaries.get(side, {}).get(METRICS[metric])

    left = of(*condition.left)
    right = condition.number if condition.right is None else of(*condition.right)
    if left is None or right is None:
        return False, "not known of both" if condition.right else f"not known of {condition.left[0]}"
    if condition.operator in _ALIKE:
        return False, "their steps have other tokens or ranks, and what is noise there is not known; use < or >"
    right *= 1.0 if condition.factor is None else condition.factor
    return _OPERATORS[condition.operator](left, right), f"{left:.6g} {condition.operator} {right:.6g}"
