"""This rank's parts of tensors, to a file and back from the files of whatever ranks wrote them.

A file is in the safetensors format: a JSON header and raw numbers, so that reading one runs no code. Its header also
says where each part lies in its whole tensor. Each part is written by one of the ranks that hold it.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan_lite.checkpoint.header import CHUNKS, Chunk, chunks_of
from torchtitan_lite.checkpoint.storage import Damaged, hasher, why_lost
from torchtitan_lite.errors import UserError

_BLOCK = 1 << 24  # bytes that are written or copied at once
_BEHIND = 64  # blocks by which checksums may be late; of a device's tensors each is a copy on the host
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor: `local` lies at `offset` of a whole of `shape`. Equal ranks: see is_written_here."""

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this rank holds: all of a plain one. It shares the tensor's memory."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), (0,) * tensor.dim(), shape)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local().detach()
    # torchao wraps what FSDP is to gather in float8.
    return Part(getattr(local, "_tensor", local), tuple(offset), shape)


def is_written_here(name: str, tensor: Tensor, first_peer: int) -> bool:
    """Whether this rank writes its part, among those that hold the same.

    first_peer: the first of the ranks that hold the same layers as this one. A tensor that is spread over some of them
    is there again on the others: the ranks with first_peer write. Copies within are shared out by name.
    """
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == first_peer
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    if first_peer not in mesh.mesh.flatten().tolist():
        return False
    turn = crc32(name.encode())
    return all(
        coordinate == turn % mesh.size(axis)
        for axis, (coordinate, placement) in enumerate(zip(place, tensor.placements, strict=True))
        if placement.is_replicate()
    )


def write_parts(path: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Write a file and flush it to the disk; return its size in bytes and checksum, which is taken on the way."""
    header: dict[str, Any] = {}
    chunks, end = {}, 0
    for name, part in parts.items():
        start, end = end, end + part.local.numel() * part.local.element_size()
        shape = list(part.local.shape)
        header[name] = {"dtype": _TYPES[part.local.dtype], "shape": shape, "data_offsets": [start, end]}
        chunks[name] = [part.offset, part.shape]
    header["__metadata__"] = {CHUNKS: json.dumps(chunks)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hasher(), 0
    behind: deque[Future[None]] = deque()
    with path.open("wb", buffering=0) as handle, ThreadPoolExecutor(1, initializer=_in_idle_time) as beside:
        for block in _blocks(len(text).to_bytes(8, "little") + text, parts):
            behind.append(beside.submit(digest.update, block))
            written = memoryview(block)
            while written:
                written = written[handle.write(written) :]
            size += len(block)
            if len(behind) > _BEHIND:
                behind.popleft().result()
        os.fsync(handle.fileno())
        for hashed in behind:
            hashed.result()
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _in_idle_time() -> None:
    """Let this thread run where the others leave a core: while the disk is waited for, at the latest at its flush."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _blocks(header: bytes, parts: Mapping[str, Part]) -> Iterator[Any]:
    yield header
    for part in parts.values():
        # Here, one at a time: what lies on a device needs no second copy of all of it on the host.
        flat = _bytes_of(part.local.to("cpu").contiguous())
        for start in range(0, len(flat), _BLOCK):
            yield flat[start : start + _BLOCK]


class Stored:
    """The tensors in files of a checkpoint, by name. Raises Damaged where a file is not as write_parts writes them.

    Files are read by ranges as they are asked for, not mapped: a mapped file counts as this process's memory, and one
    that another process cuts short would kill it.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._chunks: dict[str, list[Chunk]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for chunk in chunks_of(folder / file):
                name, shape = chunk.name, chunk.shape
                if chunk.dtype not in _DTYPES:
                    raise Damaged(f"{folder / file}: {name} is of {chunk.dtype}, which checkpoints do not have")
                if self._shapes.setdefault(name, shape) != shape:
                    raise Damaged(f"{folder / file}: {name} of shape {list(shape)}, elsewhere {self._shapes[name]}")
                chunks = self._chunks.setdefault(name, [])
                if chunks and chunks[0].dtype != chunk.dtype:
                    raise Damaged(f"{folder / file}: {name} of {chunk.dtype}, elsewhere {chunks[0].dtype}")
                chunks.append(chunk)

    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self._shapes if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._chunks[name][0].dtype]

    def read_into(self, name: str, part: Part) -> None:
        """Fill a part, in place, from all that lies in it.

        Raises UserError where the tensor is not there or another one, Damaged where it is not whole.
        """
        wanted = (part.shape, part.local.dtype)
        if name not in self._shapes:
            raise UserError(f"{name} is not in the checkpoint: it is of another model or optimizer")
        if (found := (self._shapes[name], self.dtype(name))) != wanted:
            told = [f"{list(shape)} of {dtype}" for shape, dtype in (wanted, found)]
            back = "set optimizer.state_dtype back, or " if name.startswith("optimizer.") else ""
            raise UserError(
                f"{name}: this run needs {told[0]}, the checkpoint has {told[1]}; {back}choose another checkpoint"
            )
        filled = sum(_read_common(chunk, part) for chunk in self._chunks[name])
        if filled != part.local.numel():
            raise Damaged(f"{name}: expected {part.local.numel()} numbers of it, found {filled}")


def _read_common(chunk: Chunk, part: Part) -> int:
    try:
        return _copy_common(chunk, part)
    except OSError as error:
        raise Damaged(f"{chunk.path}: cannot be read: {why_lost(chunk.path, error)}") from None


def _copy_common(chunk: Chunk, part: Part) -> int:
    """Copy what a stored chunk and a part have in common, some rows at a time; return how many numbers that is.

    Rows that both have whole are read to where they belong, without a copy between.
    """
    # A number without dims is read as a row of one.
    offset, size = chunk.offset or (0,), chunk.size or (1,)
    local = part.local if part.shape else part.local.view(1)
    begin = part.offset or (0,)
    starts = [max(a, b) for a, b in zip(offset, begin, strict=True)]
    stops = [min(a + n, b + m) for a, n, b, m in zip(offset, size, begin, tuple(local.shape), strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return 0
    dtype = _DTYPES[chunk.dtype]
    row = prod(size[1:]) * dtype.itemsize
    rows = max(1, _BLOCK // row)
    columns = tuple(slice(a - o, b - o) for a, b, o in zip(starts[1:], stops[1:], offset[1:], strict=True))
    into = tuple(slice(a - o, b - o) for a, b, o in zip(starts[1:], stops[1:], begin[1:], strict=True))
    in_whole_rows = (
        tuple(local.shape[1:]) == size[1:] == tuple(b - a for a, b in zip(starts[1:], stops[1:], strict=True))
    )
    straight = in_whole_rows and local.is_contiguous() and local.device.type == "cpu"
    buffer = None if straight else torch.empty(min(rows, stops[0] - starts[0]), *size[1:], dtype=dtype)
    with chunk.path.open("rb", buffering=0) as handle:
        for first in range(starts[0], stops[0], rows):
            count = min(rows, stops[0] - first)
            target = local[first - begin[0] : first - begin[0] + count]
            handle.seek(chunk.start + (first - offset[0]) * row)
            if buffer is None:
                _read_whole(handle, _bytes_of(target), chunk.path)
            else:
                _read_whole(handle, _bytes_of(buffer[:count]), chunk.path)
                target[(slice(None), *into)].copy_(buffer[(slice(count), *columns)])
    return prod(stop - start for start, stop in zip(starts, stops, strict=True))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    # Not reshape: it keeps the stride of a single number, whatever that is.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_whole(handle: Any, left: memoryview, path: Path) -> None:
    while left:
        count = handle.readinto(left)
        if not count:
            raise Damaged(f"{path}: ends {len(left)} bytes early")
        left = left[count:]
