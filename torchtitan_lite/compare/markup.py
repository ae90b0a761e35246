"""HTML in which text is escaped unless it says that it is markup; numbers in words for readers. No torch."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torchtitan_lite.strict_json import strict_dumps

UNKNOWN = "n/a"
_VOID = ("meta", "col")


class Html(str):
    """Markup. Any other str is text, and is escaped where it comes into markup."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escaped for content and for quoted attributes. Bytes of file names that are no UTF-8 become question marks."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. Attributes: a trailing _ falls away, others become -; True is a bare one, None and False are none."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    start = f"<{name}{written}>"
    return Html(start if name in _VOID else f"{start}{joined(content)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(text(part) for part in parts))


def table(label: str, head: Sequence[object], rows: Iterable[Sequence[object]], texts: int = 1) -> Html:
    """In a box of its own, which scrolls where the window is narrow. texts: columns from the left that hold words;
    those after them hold numbers. A row of one cell heads those after it."""

    def line(cells: Sequence[object], kind: str) -> Html:
        if len(cells) == 1:
            return tag("tr", tag("th", cells[0], colspan=len(head), scope="rowgroup"))
        return tag("tr", *(_cell(cell, kind, index, texts) for index, cell in enumerate(cells)))

    body = [line(row, "td") for row in rows]
    inner = tag("table", tag("thead", line(head, "th")), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")


def _cell(cell: object, kind: str, index: int, texts: int) -> Html:
    scope = "col" if kind == "th" else "row" if index == 0 else None
    return tag("th" if index == 0 else kind, cell, scope=scope, class_="number" if index >= texts else None)


def finite(value: Any) -> float | None:
    """None for what is no number, and for infinity and NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def number(value: Any, form: str, unit: str = "") -> str:
    """value: a float, None, or as strict_json writes what is not finite."""
    if value is None:
        return UNKNOWN
    return "not finite" if (known := finite(value)) is None else f"{known:{form}}{unit}"


def scaled(value: Any, unit: str = "") -> str:
    """Large ones with k, M, G, T, P, E."""
    if (known := finite(value)) is None:
        return number(value, "")
    prefix = 0
    while abs(known) >= 999.95 and prefix < 6:
        known, prefix = known / 1000, prefix + 1
    return f"{known:.4g} {' kMGTPE'[prefix].strip()}{unit}".rstrip()


def duration(value: Any) -> str:
    """value: seconds."""
    if (known := finite(value)) is None:
        return number(value, "")
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if abs(known) >= 2 * size:
            return f"{known / size:.4g} {unit}"
    return f"{known * 1e3:.4g} ms"


def data(name: str, value: Any) -> Html:
    """A document for scripts of the page, which no string in it can end."""
    written = strict_dumps(value)
    for sign in "<>&\u2028\u2029":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return tag("script", Html(written), type="application/json", id=name)
