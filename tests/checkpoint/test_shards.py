"""Parts of tensors in files: any division to any other, little memory, no code from a file, nothing bad passes."""

import itertools
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchtitan_lite.checkpoint import shards, storage
from torchtitan_lite.checkpoint.shards import Part, Stored, write_parts
from torchtitan_lite.checkpoint.storage import Damaged, hasher
from torchtitan_lite.errors import UserError


def _pieces(shape: tuple[int, ...], dim: int, pieces: int) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Offsets and slices of a division as torch.chunk makes it: the last piece is smaller, or there are fewer."""
    edges = [0]
    for chunk in torch.arange(shape[dim]).chunk(pieces):
        edges.append(edges[-1] + len(chunk))
    found = []
    for start, stop in itertools.pairwise(edges):
        offset = tuple(start if axis == dim else 0 for axis in range(len(shape)))
        found.append((offset, tuple(slice(start, stop) if axis == dim else slice(None) for axis in range(len(shape)))))
    return found


def _write(folder: Path, name: str, whole: torch.Tensor, dim: int, pieces: int) -> list[str]:
    files = []
    for rank, (offset, where) in enumerate(_pieces(tuple(whole.shape), dim, pieces)):
        files.append(storage.file_of(rank))
        write_parts(folder / files[-1], {name: Part(whole[where], offset, tuple(whole.shape))})
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("block", [1 << 24, 96])
def test_any_division_is_read_in_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(shards, "_BLOCK", block)
    shape = (7, 5, 3)
    whole = torch.randint(-100, 100, shape).to(dtype)
    for dim, pieces in ((0, 1), (0, 3), (0, 4), (1, 2), (2, 3)):
        folder = tmp_path / f"{dim}{pieces}"
        folder.mkdir()
        stored = Stored(folder, _write(folder, "weight", whole, dim, pieces))
        for into, count in ((0, 1), (0, 2), (0, 5), (1, 3), (2, 2)):
            for offset, where in _pieces(shape, into, count):
                part = torch.zeros_like(whole[where])
                stored.read_into("weight", Part(part, offset, shape))
                assert torch.equal(part, whole[where]), (dim, pieces, into, count)


def test_numbers_without_dims_and_strided_parts_are_read(tmp_path: Path) -> None:
    step, matrix = torch.tensor(7.0), torch.arange(12.0).view(3, 4).t()
    write_parts(tmp_path / "rank-00000.safetensors", {"s": Part(step, (), ()), "m": Part(matrix, (0, 0), (4, 3))})
    stored = Stored(tmp_path, ["rank-00000.safetensors"])
    found, strided = torch.tensor(0.0), torch.zeros(3, 4).t()
    stored.read_into("s", Part(found, (), ()))
    stored.read_into("m", Part(strided, (0, 0), (4, 3)))
    assert found == step
    assert torch.equal(strided, matrix)


def test_the_checksum_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK", 1000)
    path = tmp_path / "rank-00000.safetensors"
    entry = write_parts(path, {"w": Part(torch.randn(1000, 3), (0, 0), (1000, 3))})
    digest = hasher()
    digest.update(path.read_bytes())
    assert entry == {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def test_other_readers_of_the_format_read_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path, weight = tmp_path / "rank-00000.safetensors", torch.randn(4, 3)
    write_parts(path, {"w": Part(weight, (0, 0), (4, 3)), "e": Part(weight.bfloat16(), (0, 0), (4, 3))})
    assert torch.equal(load_file(path)["w"], weight)


def _peak_of_reading(folder: str, files: list[str], numbers: int) -> int:
    """Bytes of memory above the part itself that reading a quarter of a tensor takes at most."""
    part = torch.zeros(numbers // 4)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    Stored(Path(folder), files).read_into("w", Part(part, (numbers // 4,), (numbers,)))
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])


def test_reading_takes_little_memory_beside_what_is_read(pool: Any, tmp_path: Path) -> None:
    numbers = 1 << 26  # 256 MiB, a quarter of them read
    whole = torch.arange(numbers, dtype=torch.int32).view(torch.float32)
    files = _write(tmp_path, "w", whole, 0, 2)
    (peak,) = pool.run(_peak_of_reading, 1, str(tmp_path), files, numbers)
    assert peak < 0.3 * numbers, f"{peak / 2**20:.0f} MiB above a part of {numbers / 2**20:.0f} MiB"


def test_what_is_asked_for_is_there_and_whole(tmp_path: Path) -> None:
    whole = torch.randn(6, 2)
    files = _write(tmp_path, "w", whole, 0, 3)
    stored = Stored(tmp_path, files)
    with pytest.raises(UserError, match="other is not in the checkpoint: it is of another model or optimizer"):
        stored.read_into("other", Part(torch.zeros(1), (0,), (1,)))
    with pytest.raises(UserError, match=r"w: this run needs \[6, 3\] of torch.float32, the checkpoint has \[6, 2\]"):
        stored.read_into("w", Part(torch.zeros(6, 3), (0, 0), (6, 3)))
    with pytest.raises(UserError, match=r"needs \[6, 2\] of torch.float64"):
        stored.read_into("w", Part(torch.zeros(6, 2, dtype=torch.float64), (0, 0), (6, 2)))
    for missing in range(3):
        partial = Stored(tmp_path, files[:missing] + files[missing + 1 :])
        with pytest.raises(Damaged, match="w: expected 12 numbers of it, found 8"):
            partial.read_into("w", Part(torch.zeros(6, 2), (0, 0), (6, 2)))
    with pytest.raises(Damaged, match="expected 12 numbers of it, found 16"):
        Stored(tmp_path, [*files, files[0]]).read_into("w", Part(torch.zeros(6, 2), (0, 0), (6, 2)))


def _file(header: Any, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _header(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes.pop("entry", {})}
    places = changes.pop("places", {"w": [[0, 0], [2, 2]]})
    return {"w": entry, "__metadata__": {"chunks": json.dumps(places)}, **changes}


class _Runs:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return (pytest.fail, ("code from the file was run",))


HOSTILE = {
    "empty": b"",
    "a pickle": pickle.dumps(_Runs()),
    "shorter than its length": (1 << 40).to_bytes(8, "little"),
    "a length that overflows": b"\xff" * 8 + b"{}",
    "not JSON": _file(b"{]" * 8),
    "nested without end": _file(b"[" * 50_000),
    "a list": _file([1, 2]),
    "no metadata": _file({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}),
    "data cut off": _file(_header(), b"\0" * 12),
    "more data": _file(_header(), b"\0" * 20),
    "offsets past the end": _file(_header(entry={"data_offsets": [16, 32]})),
    "negative offsets": _file(_header(entry={"data_offsets": [-16, 0]})),
    "a shape that its bytes do not hold": _file(_header(entry={"shape": [1 << 40, 2]})),
    "a negative shape": _file(_header(entry={"shape": [-2, -2]})),
    "an unknown dtype": _file(_header(entry={"dtype": "OBJECT"})),
    "a dtype that is never written": _file(_header(entry={"dtype": "U16", "shape": [4, 2]})),
    "no place": _file(_header(places={})),
    "a place outside": _file(_header(places={"w": [[1, 0], [2, 2]]})),
    "a place before the start": _file(_header(places={"w": [[-1, 0], [2, 2]]})),
    "a place of other dims": _file(_header(places={"w": [[0], [2]]})),
    "a place that is no number": _file(_header(places={"w": [["a", 0], [2, 2]]})),
    "a place that is no list": _file(_header(places={"w": 7})),
    "places that are no JSON": _file({**_header(), "__metadata__": {"chunks": "{"}}),
    "places nested without end": _file({**_header(), "__metadata__": {"chunks": "[" * 50_000}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"rank-00000\.safetensors: "):
        Stored(tmp_path, [path.name])


def test_the_hostile_files_differ_from_a_good_one_in_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(_file(_header()))
    assert Stored(tmp_path, [path.name]).shape("w") == (2, 2)


def test_files_that_disagree_on_a_tensor_are_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "rank-00000.safetensors", {"w": Part(torch.zeros(2), (0,), (4,))})
    write_parts(tmp_path / "rank-00001.safetensors", {"w": Part(torch.zeros(2), (2,), (5,))})
    with pytest.raises(Damaged, match=r"rank-00001.safetensors: w of shape \[5\], elsewhere \(4,\)"):
        Stored(tmp_path, ["rank-00000.safetensors", "rank-00001.safetensors"])


def test_random_headers_never_end_in_another_error(tmp_path: Path) -> None:
    """Whatever bytes a header has, the answer is a checkpoint's tensors or Damaged."""
    path, choose = tmp_path / "rank-00000.safetensors", random.Random(0)
    good = _file(_header())
    refused = 0
    for _ in range(500):
        content = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            content[choose.randrange(len(content) - 16)] = choose.randrange(256)
        path.write_bytes(content)
        try:
            stored = Stored(tmp_path, [path.name])
            for name in stored.names(""):
                shape = stored.shape(name)
                stored.read_into(name, Part(torch.zeros(shape, dtype=stored.dtype(name)), (0,) * len(shape), shape))
        except Damaged:
            refused += 1
    assert refused > 300
