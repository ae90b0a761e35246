"""Damage to a checkpoint, drawn at random: bits, lengths, missing files, swapped files. All of it must be found."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torchtitan_lite.checkpoint import storage

Damage = Callable[[Path, Path, random.Random], str]


def _bit_flip(folder: Path, _: Path, choose: random.Random) -> str:
    """One bit of any file, the manifest too. A flip that leaves the manifest's contents as they are is drawn again:
    1e-05 and 1E-05 are one number."""
    path = choose.choice(sorted(folder.iterdir()))
    before = path.read_bytes()
    while True:
        byte, bit = choose.randrange(len(before)), choose.randrange(8)
        after = bytearray(before)
        after[byte] ^= 1 << bit
        if path.name != storage.MANIFEST or _contents(bytes(after)) != _contents(before):
            path.write_bytes(after)
            return f"bit {bit} of byte {byte} of {path.name}"


def _contents(manifest: bytes) -> object:
    try:
        return json.loads(manifest)
    except ValueError:
        return None


def _truncation(folder: Path, _: Path, choose: random.Random) -> str:
    path = choose.choice(sorted(folder.iterdir()))
    size = choose.randrange(path.stat().st_size)
    with path.open("rb+") as handle:
        handle.truncate(size)
    return f"{path.name} cut to {size} bytes"


def _deletion(folder: Path, _: Path, choose: random.Random) -> str:
    path = choose.choice(sorted(folder.iterdir()))
    path.unlink()
    return f"{path.name} deleted"


def _swap(folder: Path, _: Path, choose: random.Random) -> str:
    """Two ranks' files in each other's place."""
    one, other = choose.sample(sorted(folder.glob("rank-*")), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} and {other.name} swapped"


def _other_step(folder: Path, older: Path, choose: random.Random) -> str:
    """A file of the checkpoint before in the place of this one's: same name, same size."""
    path = choose.choice(sorted(folder.iterdir()))
    shutil.copy(older / path.name, path)
    return f"{path.name} of another step"


def _zeroes(folder: Path, _: Path, choose: random.Random) -> str:
    """A block that never reached the disk, as file systems leave it after a crash."""
    path = choose.choice(sorted(folder.glob("rank-*")))
    content = bytearray(path.read_bytes())
    start = choose.randrange(len(content) - 512)
    if not any(content[start : start + 512]):
        start = 0  # the header
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)
    return f"512 bytes of {path.name} from {start} on are zero"


def _more_bytes(folder: Path, _: Path, choose: random.Random) -> str:
    path = choose.choice(sorted(folder.glob("rank-*")))
    with path.open("ab") as handle:
        handle.write(choose.randbytes(choose.randint(1, 100)))
    return f"{path.name} is longer"


DAMAGES: dict[str, Damage] = {
    "single bit flipped": _bit_flip,
    "file truncated": _truncation,
    "file deleted": _deletion,
    "two files swapped": _swap,
    "file of another step": _other_step,
    "block of zeroes": _zeroes,
    "bytes appended": _more_bytes,
}
# Of every so many; single bits are the hardest to see.
_SHARES = {"single bit flipped": 4}


def damage(kind: str, good: Path, older: Path, scratch: Path, choose: random.Random) -> tuple[Path, str]:
    """A damaged copy of the checkpoint `good` in `scratch`, under the same name, and what is wrong with it."""
    copy = scratch / good.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    return copy, DAMAGES[kind](copy, older, choose)


def kinds(count: int) -> list[str]:
    cycle = [kind for kind in DAMAGES for _ in range(_SHARES.get(kind, 1))]
    return [cycle[index % len(cycle)] for index in range(count)]


def undetected(good: Path, older: Path, scratch: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage copies of a checkpoint `count` times: (how often each kind, what verification did not find)."""
    choose, done, missed = random.Random(seed), Counter[str](), []
    for kind in kinds(count):
        copy, what = damage(kind, good, older, scratch, choose)
        done[kind] += 1
        if not storage.verified(copy):
            missed.append(what)
    return done, missed
