"""A bar of coloured parts as a PNG, without a library for it."""

import struct
import zlib
from collections.abc import Sequence

# By name; parts take them in turn.
COLOURS = {
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "green": (44, 160, 44),
    "grey": (199, 199, 199),
    "red": (214, 39, 40),
    "purple": (148, 103, 189),
}
_SIZE = (640, 48)


def stacked_bar(parts: Sequence[float]) -> tuple[bytes, int, int]:
    """A PNG with a stretch for each part, in order and as long as its share of the sum: (file, width, height).

    Raises ValueError for parts that are negative, no numbers, or nothing together.
    """
    width, height = _SIZE
    whole = sum(parts)
    if not 0 < whole < float("inf") or min(parts) < 0:
        raise ValueError(f"parts of a bar: {list(parts)}: expected at least one above zero, and none below")
    row, end = b"", 0.0
    for part, colour in zip(parts, _colours(len(parts)), strict=True):
        end += part
        row += bytes(colour) * (round(width * end / whole) - len(row) // 3)
    # Each row of pixels begins with the filter it went through: none.
    pixels = zlib.compress((b"\0" + row) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
    file = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return file, width, height


def _colours(count: int) -> list[tuple[int, int, int]]:
    colours = list(COLOURS.values())
    return [colours[index % len(colours)] for index in range(count)]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
