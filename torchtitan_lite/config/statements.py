"""A TOML text as its statements in order, each with the lines it was written in: what a parser throws away."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan_lite.strict_json import flat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Statement:
    """Lines of a text that belong together.

    section: the header they stand under; of a header, its own name; "" before the first. leaves: of `pair`, the values
    it sets, by dotted names below the section; several where it is an inline table.
    """

    kind: Literal["blank", "comment", "header", "pair"]
    lines: tuple[str, ...]
    section: str
    leaves: dict[str, Any]


def statements(text: str) -> Iterator[Statement]:
    """The statements of a text that tomllib takes whole."""
    section = ""
    lines = iter(text.replace("\r\n", "\n").split("\n"))  # not splitlines(): a form feed or U+2028 ends no line of TOML
    for line in lines:
        start = line.strip()
        if not start:
            yield Statement("blank", (line,), section, {})
        elif start.startswith("#"):
            yield Statement("comment", (line,), section, {})
        elif start.startswith("["):
            section = _name(tomllib.loads(line))
            yield Statement("header", (line,), section, {})
        else:
            taken = [line]
            while (table := _parsed("\n".join(taken))) is None:
                taken.append(next(lines))
            yield Statement("pair", tuple(taken), section, flat(table))


def _name(table: dict[str, Any]) -> str:
    """The dotted name of the only table in a table; the last may be a list's."""
    names = []
    inner: Any = table
    while isinstance(inner, dict) and inner:
        ((name, inner),) = inner.items()
        names.append(name)
    return ".".join(names)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None  # an array or a string that goes on in the next line
