"""What tests see of a checkpoint: its tensors put together, and damage done to its files."""

from pathlib import Path
from typing import Any

import torch

from torchtitan_lite.checkpoint import storage
from torchtitan_lite.checkpoint.shards import Part, Stored
from torchtitan_lite.observability.sinks import read_lines


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in `folder`, by name."""
    stored = Stored(folder, sorted(storage.read_manifest(folder)["files"]))
    tensors = {}
    for name in stored.names(""):
        shape = stored.shape(name)
        tensors[name] = torch.empty(shape, dtype=stored.dtype(name))
        stored.read_into(name, Part(tensors[name], (0,) * len(shape), shape))
    return tensors


def last_lines(path: Path) -> list[dict[str, Any]]:
    """A line a step of metrics.jsonl or samples.jsonl: of those that a resume superseded, the last."""
    return list({line["step"]: line for line in read_lines(path)}.values())


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of one name in the events.jsonl of a run."""
    return [line for line in read_lines(folder / "events.jsonl") if line["event"] == name]


def flip_a_bit(path: Path, byte: int = -1, bit: int = 0) -> None:
    """Change one bit of a file: of the byte in the middle, or of another."""
    content = bytearray(path.read_bytes())
    content[byte if byte != -1 else len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def contents(step: int, **changes: Any) -> dict[str, Any]:
    """A manifest without files."""
    return {
        "step": step,
        "position": 8 * step,
        "tokens_seen": 256 * step,
        "world_size": 1,
        "global_batch_size": 8,
        "device": "cpu",
        "holds": "all",
        "identity": {"model": {"dim": 256, "rope": None}, "debug.seed": 42},
        "files": {},
        **changes,
    }
