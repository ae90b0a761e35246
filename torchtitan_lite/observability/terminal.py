"""Text for a terminal: bars, sparklines, durations, and lines that are drawn again in place. No torch."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

# A line and its colour: what is not told apart by words is not told apart by colour either.
Line = tuple[str, str]

_COLOURS = {"": "", "good": "32", "warning": "33", "bad": "31", "dim": "2", "bold": "1"}
_LEVELS = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS = "_.-=+*%#"


def colours_on(stream: TextIO) -> bool:
    """On a terminal, unless NO_COLOR (https://no-color.org) or TERM=dumb say otherwise."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str) -> str:
    """`text` in a colour of the table, `""` for none."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colour and text else text


def clipped(text: str, width: int) -> str:
    """At most `width` characters, the last one a mark where some were cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + ">"


def bar(share: float, width: int) -> str:
    """`share` (0 to 1) of `width` characters, brackets included."""
    inner = max(1, width - 2)
    full = int(min(1.0, max(0.0, share)) * inner)
    return f"[{'#' * full}{'-' * (inner - full)}]"


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """At most `width` characters, each the mean of as many values as any other. `x` for one that is not finite."""
    count = min(width, len(values))
    if count < 1:
        return ""
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    levels = _PLAIN_LEVELS if plain else _LEVELS
    top = len(levels) - 1
    return "".join(
        "x" if not math.isfinite(mean) else levels[round((mean - low) / span * top) if span else 0] for mean in means
    )


def duration(seconds: float) -> str:
    """In the two largest units, as in 45 s, 1 min 05 s, 3 h 20 min, 2 d 04 h; n/a for what is not finite."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for unit, size, below, name in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below:02d} {name}"
    return f"{whole} s"


class Screen:
    """Lines that take the place of those drawn before. A terminal that is too low shows the first ones."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._drawn, self._columns = stream, 0, 0

    def draw(self, lines: Sequence[Line], columns: int, rows: int) -> None:
        """columns, rows: of the terminal now."""
        colours = colours_on(self._stream)
        shown = lines[: max(1, rows - 1)]
        # Other widths have wrapped what stands there: nobody knows how high it is now.
        up = "\x1b[2J\x1b[H" if self._columns not in (0, columns) else f"\x1b[{self._drawn}F" if self._drawn else ""
        text = "".join(f"{painted(line, colour) if colours else line}\x1b[K\n" for line, colour in shown)
        self._stream.write(f"{up}{text}\x1b[J")
        self._stream.flush()
        self._drawn, self._columns = len(shown), columns


def one_line(text: str) -> str:
    """`text` without what would break a line or command the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
