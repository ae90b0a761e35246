"""Files that are there whole or not at all, and still are after a power cut."""

import os
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Write a text file in one move: a reader never sees half of it, and it is on the disk on return."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
