"""Typed decoding: a TOML value becomes the value its field declares, or a UserError that names the mend."""

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan_lite.errors import UserError

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def nearest(word: str, choices: list[str]) -> str:
    """`; did you mean X?`, or an empty string where nothing is close."""
    from difflib import get_close_matches

    matches = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def describe(annotation: Any) -> str:
    """An annotation in words: `a list of strings`, `one of "a", "b"`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(annotation))
    if origin is list:
        return "a list, each item " + describe(get_args(annotation)[0])
    if origin is dict:
        return "a table, each value " + describe(get_args(annotation)[1])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in get_args(annotation) if arm is not type(None))
    return _NAMES[annotation]


def decode(value: Any, annotation: Any, where: str) -> Any:
    """Return `value` as `annotation` (scalars, Literal, list, dict with string keys, unions of them).

    An integer is taken where a number is asked for; nothing else is converted, a bool is no integer.
    `where` opens the message of the UserError that a mismatch raises.
    """
    origin = get_origin(annotation)
    if origin is Literal:
        choices = list(get_args(annotation))
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            hint = nearest(value, [str(c) for c in choices]) if isinstance(value, str) else ""
            raise UserError(f"{where} = {_show(value)}: expected {describe(annotation)}{hint}")
        return value
    if origin is list and isinstance(value, list):
        (item,) = get_args(annotation)
        return [decode(entry, item, f"{where}[{index}]") for index, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        item = get_args(annotation)[1]
        return {key: decode(entry, item, f"{where}.{key}") for key, entry in value.items()}
    if origin in (Union, types.UnionType):
        for arm in get_args(annotation):
            try:
                return decode(value, arm, where)
            except UserError:
                continue
    if annotation is float and type(value) is int:
        return float(value)
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    raise UserError(f"{where} = {_show(value)}: expected {describe(annotation)}, got {_kind(value)}")


def check_bounds(value: Any, bounds: Any, where: str) -> None:
    """Hold a number to its field's bounds (see schema.setting); NaN fails every one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if "auto" in bounds and value == bounds["auto"]:
        return
    auto = f", or {bounds['auto']}" if "auto" in bounds else ""
    if math.isnan(value):
        raise UserError(f"{where} = nan: expected a number")
    if "minimum" in bounds and value < bounds["minimum"]:
        raise UserError(f"{where} = {value}: must be at least {bounds['minimum']}{auto}")
    if "above" in bounds and value <= bounds["above"]:
        raise UserError(f"{where} = {value}: must be more than {bounds['above']:g}{auto}")
    if "maximum" in bounds and value > bounds["maximum"]:
        raise UserError(f"{where} = {value}: must be at most {bounds['maximum']}{auto}")


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(value: Any) -> str:
    return {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a table",
    }.get(type(value), type(value).__name__)
