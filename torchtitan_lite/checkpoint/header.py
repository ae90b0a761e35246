"""What a checkpoint's file says of the tensors in it. No torch: a laptop may ask."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan_lite.checkpoint.storage import Damaged, why_lost

CHUNKS = "chunks"  # the entry of a header's metadata that says where parts lie


@dataclass(frozen=True)
class Chunk:
    """A stored block of the tensor `name`, of `shape`: `size` at `offset` of it.

    dtype: as the safetensors format calls it. start, bytes: where in the file its numbers are.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    start: int
    bytes: int
    dtype: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


def chunks_of(path: Path) -> Iterator[Chunk]:
    """All blocks in a file; only its header is read. Raises Damaged where it is not as write_parts writes it."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():
            raise Damaged(f"{path}: is no plain file")
        with path.open("rb") as handle, safe_open(path, framework="numpy"):  # it checks that header and size agree
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        places = json.loads(header.pop("__metadata__")[CHUNKS])
        for name, entry in header.items():
            offset, shape = map(_whole_numbers, places[name])
            size, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not _lies_within(offset, size, shape):
                raise Damaged(f"{path}: {name}: a part of {size} at {offset} does not lie in {shape}")
            yield Chunk(name, shape, path, 8 + length + begin, end - begin, entry["dtype"], offset, size)
    except Damaged:
        raise
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {why_lost(path, error)}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: is no file of a checkpoint: {error}") from None


def _whole_numbers(found: list[int]) -> tuple[int, ...]:
    if not all(type(number) is int for number in found):
        raise TypeError(f"expected whole numbers, found {found!r:.60}")
    return tuple(found)


def _lies_within(offset: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if not len(offset) == len(size) == len(shape):
        return False
    return all(o >= 0 and o + n <= whole for o, n, whole in zip(offset, size, shape, strict=True))
