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


def _seconds(value: Any) -> float:
    if not 0.0 <= (seconds := float(value)) < _MOST_SECONDS:  # nor is NaN
        raise ValueError
    return seconds


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a number", float)  # those that are not finite are written as strings
SECONDS = Kind("seconds", _seconds)
COUNT = Kind("a whole number of at least 1", _count)
TEXT = Kind("a string", _of_type(str))
TEXTS = Kind("a list of strings", _texts)
FLAG = Kind("true or false", _of_type(bool))
TABLE = Kind("an object", _of_type(dict))


def fields(
    record: Any, source: str, needed: Mapping[str, Kind], known: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """The values of `needed`, and of `known` with None for those that are missing or null, by their dotted names.

    source: the file, or its line. Raises UserError where one is not of its kind.
    """
    if not isinstance(record, dict):
        raise _refused(source, "", "an object", record)
    found: dict[str, Any] = {}
    for name, kind in {**needed, **(known or {})}.items():
        value = _at(record, name, source)
        if value in (None, _MISSING) and name not in needed:
            found[name] = None
            continue
        try:
            found[name] = kind.read(value)
        except (ValueError, TypeError, OverflowError):
            raise _refused(source, name, kind.told, value) from None
    return found


def _at(record: dict[str, Any], name: str, source: str) -> Any:
    """_MISSING where it, or a section on the way to it, is missing."""
    inner, passed = record, ""
    *sections, last = name.split(".")
    for section in sections:
        if section not in inner:
            return _MISSING
        passed = f"{passed}.{section}".lstrip(".")
        if not isinstance(inner := inner[section], dict):
            raise _refused(source, passed, "an object", inner)
    return inner.get(last, _MISSING)


def _refused(source: str, name: str, expected: str, value: Any) -> UserError:
    shown = "nothing" if value is _MISSING else json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    at = f"{name}: " if name else ""
    return UserError(f"{source}: {at}expected {expected}, got {shown}; it is damaged, or of another version")
