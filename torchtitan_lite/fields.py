"""Values of JSON files that another version may have written, or a disk damaged: of the kind that readers rest on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan_lite.errors import UserError

_MOST_SECONDS = 1e12
_MISSING = object()


@dataclass(frozen=True)
class Kind:
    """What a value must be. told: in words. read: gives it, raises ValueError, TypeError or OverflowError."""

    told: str
    read: Callable[[Any], Any]


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError
    return value


def _count(value: Any) -> int:
    if (whole := _whole(value)) < 1:
        raise ValueError
    return whole


def _of_type(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _seconds(value: Any) -> float:
    if not 0.0 <= (seconds := _number(value)) < _MOST_SECONDS:  # nor is NaN
        raise ValueError
    return seconds


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a number", _number)  # those that are not finite are written as strings
SECONDS = Kind("seconds", _seconds)
COUNT = Kind("a whole number of at least 1", _count)
TEXT = Kind("a string", _of_type(str))
TEXTS = Kind("a list of strings", _texts)
FLAG = Kind("true or false", _of_type(bool))
TABLE = Kind("an object", _of_type(dict))


def fields(
    record: Any,
    source: str,
    needed: Mapping[str, Kind],
    known: Mapping[str, Kind] | None = None,
    mend: str = "mend or remove it",
) -> dict[str, Any]:
    """The values of `needed`, and of `known` with None for those that are missing or null, by their dotted names.

    source: the file, or its line. mend: what is to be done with it where one is not of its kind, told by the UserError
    that is raised then.
    """
    try:
        return _fields(record, needed, known or {})
    except _Refused as refused:
        raise UserError(f"{source}: {refused}; it is damaged, or of another version: {mend}") from None


class _Refused(Exception):
    """What a value was to be, and what it is."""

    def __init__(self, name: str, expected: str, value: Any) -> None:
        shown = "nothing" if value is _MISSING else json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        super().__init__(f"{name}: expected {expected}, got {shown}" if name else f"expected {expected}, got {shown}")


def _fields(record: Any, needed: Mapping[str, Kind], known: Mapping[str, Kind]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _Refused("", "an object", record)
    found: dict[str, Any] = {}
    for name, kind in {**needed, **known}.items():
        value = _at(record, name)
        if value in (None, _MISSING) and name not in needed:
            found[name] = None
            continue
        try:
            found[name] = kind.read(value)
        except (ValueError, TypeError, OverflowError):
            raise _Refused(name, kind.told, value) from None
    return found


def _at(record: dict[str, Any], name: str) -> Any:
    """_MISSING where it, or a section on the way to it, is missing."""
    inner, passed = record, ""
    *sections, last = name.split(".")
    for section in sections:
        if section not in inner:
            return _MISSING
        passed = f"{passed}.{section}".lstrip(".")
        if not isinstance(inner := inner[section], dict):
            raise _Refused(passed, "an object", inner)
    return inner.get(last, _MISSING)
