"""Positions of the global order that a run passes over, for good: `passed_over.json` in its folder. No torch.

With them, which samples a step takes is still a function of its position alone.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torchtitan_lite.errors import UserError
from torchtitan_lite.files import replace

FILE = "passed_over.json"

Ranges = Sequence[tuple[int, int]]


def beyond(ranges: Ranges, position: int, count: int) -> int:
    """The position `count` positions after `position`, and not one that is passed over.

    ranges: as read_passed_over returns them.
    """
    place = position + count
    for begin, end in ranges:
        if end > position and begin <= place:
            place += end - max(begin, position)
    return place


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending, apart from each other."""
    apart: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if apart and begin <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((begin, end))
    return apart


def read_passed_over(folder: Path) -> list[tuple[int, int]]:
    """Ranges [begin, end) of positions, ascending, apart; none where there is no file. Raises UserError."""
    path = folder / FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; mend it, or remove it to pass over nothing") from None
    ranges = contents.get("positions") if isinstance(contents, dict) else None
    if not isinstance(ranges, list) or not all(map(_is_range, ranges)):
        raise UserError(
            f'{path}: expected {{"positions": [[begin, end], ...]}} with 0 <= begin < end; mend it, or remove it to '
            "pass over nothing"
        )
    return merged((begin, end) for begin, end in ranges)


def write_passed_over(folder: Path, ranges: Ranges) -> None:
    """In one move, and on the disk when it returns. Raises UserError."""
    try:
        replace(folder / FILE, json.dumps({"positions": ranges}))
    except OSError as error:
        raise UserError(
            f"{folder / FILE}: cannot be written: {error.strerror}; make room or mend the folder, and start again"
        ) from None


def _is_range(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(type(number) is int for number in entry)
        and 0 <= entry[0] < entry[1]
    )
