"""Typed decoding: a TOML value becomes the value its field declares, or a UserError that names the mend."""

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from torchtitan_lite.errors import UserError

_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_GOT = {**_EXPECTED, bool: "a boolean", list: "a list", dict: "a table"}


def nearest(word: str, choices: list[str], cutoff: float = 0.6, before: str = "") -> str:
    """`; did you mean X?` with `before` in front of X, or an empty string where nothing is close."""
    from difflib import get_close_matches

    # Case is the first thing to get wrong: 8b for 8B.
    spelled = {choice.lower(): choice for choice in reversed(choices)}
    matches = get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return f"; did you mean {before}{spelled[matches[0]]}?" if matches else ""


def describe(annotation: Any) -> str:
    """An annotation in words: `a list, each item a string`, `one of "a", "b"`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(annotation))
    if origin is list:
        return "a list, each item " + describe(get_args(annotation)[0])
    if is_dataclass(annotation):
        return "a table of " + ", ".join(field.name for field in fields(annotation))
    return _EXPECTED[annotation]


def decode(value: Any, annotation: Any, where: str) -> Any:
    """Return `value` as `annotation`: a scalar, a Literal, a dataclass of those from a table, or a list to any depth.

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
    if is_dataclass(annotation) and isinstance(value, dict):
        return _decode_table(value, annotation, where)
    if annotation is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where}: the number is larger than a float can be") from None
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    raise UserError(
        f"{where} = {_show(value)}: expected {describe(annotation)}, got {_GOT.get(type(value), type(value).__name__)}"
    )


def _decode_table(table: dict[str, Any], schema: Any, where: str) -> Any:
    known = {field.name: field for field in fields(schema)}
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}"
        if key not in known:
            hint = nearest(key, list(known)) or f"; there are: {', '.join(known)}"
            raise UserError(f"{name}: no such key{hint}")
        values[key] = decode(value, known[key].type, name)
        check_bounds(values[key], known[key].metadata, name)
    return schema(**values)


def check_bounds(value: Any, bounds: Any, where: str) -> None:
    """Hold a number to its field's bounds (see schema.setting)."""
    if type(value) not in (int, float) or ("auto" in bounds and value == bounds["auto"]):
        return
    auto = f", or {bounds['auto']}" if "auto" in bounds else ""
    if not math.isfinite(value) and not (value == math.inf and bounds.get("infinite")):
        raise UserError(f"{where} = {value}: expected a finite number")
    if "minimum" in bounds and value < bounds["minimum"]:
        raise UserError(f"{where} = {value}: must be at least {bounds['minimum']}{auto}")
    if "above" in bounds and value <= bounds["above"]:
        raise UserError(f"{where} = {value}: must be more than {bounds['above']:g}{auto}")
    if "below" in bounds and value >= bounds["below"]:
        raise UserError(f"{where} = {value}: must be less than {bounds['below']:g}{auto}")
    if "maximum" in bounds and value > bounds["maximum"]:
        raise UserError(f"{where} = {value}: must be at most {bounds['maximum']}{auto}")


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
