"""Parts of tensors, written by some ranks and read by others: cut anywhere, laid out in any way."""

import random
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchtitan_lite.checkpoint import shards
from torchtitan_lite.checkpoint.shards import Part, Stored, write_parts
from torchtitan_lite.checkpoint.storage import Damaged

SHAPES = ((), (1,), (7,), (5, 4), (4, 3, 6))
TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def _whole(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def _cut(shape: tuple[int, ...], chance: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of boxes that make up a shape."""
    cuts = [sorted({0, n, *(chance.randrange(n + 1) for _ in range(chance.randrange(3)))}) for n in shape]
    spans = [list(pairwise(ends)) for ends in cuts]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*spans)]


def _box(whole: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]


@pytest.mark.parametrize("block", [16, 1 << 24])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_was_cut_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, block: int
) -> None:
    monkeypatch.setattr(shards, "_BLOCK", block)  # some rows, or all, at once
    chance = random.Random(seed)
    torch.manual_seed(seed)
    wholes = {f"{shape} {dtype}": _whole(shape, dtype) for shape in SHAPES for dtype in TYPES}
    files: list[dict[str, Part]] = []
    for name, whole in wholes.items():
        for index, (offset, size) in enumerate(_cut(tuple(whole.shape), chance)):
            if index == len(files):
                files.append({})
            files[index][name] = Part(_box(whole, offset, size), offset, tuple(whole.shape))
    for index, parts in enumerate(files):
        write_parts(tmp_path / str(index), parts)
    stored = Stored(tmp_path, [str(index) for index in range(len(files))])
    for name, whole in wholes.items():
        for offset, size in _cut(tuple(whole.shape), chance):
            layouts = [torch.empty(size, dtype=whole.dtype)]
            if len(size) == 2:
                layouts.append(torch.empty(size[::-1], dtype=whole.dtype).t())
                layouts.append(torch.zeros(size[0] + 2, size[1] + 3, dtype=whole.dtype)[1:-1, 2:-1])
            for local in layouts:
                stored.read_into(name, Part(local, offset, tuple(whole.shape)))
                assert torch.equal(local, _box(whole, offset, size)), (name, offset, size, local.stride())


def test_reading_a_part_touches_nothing_beside_it(tmp_path: Path) -> None:
    write_parts(tmp_path / "file", {"a": Part(torch.arange(12.0).view(4, 3), (0, 0), (4, 3))})
    around = torch.full((6, 3), -1.0)
    Stored(tmp_path, ["file"]).read_into("a", Part(around[1:3], (2, 0), (4, 3)))
    assert around.tolist() == [[-1.0] * 3, [6.0, 7.0, 8.0], [9.0, 10.0, 11.0], *[[-1.0] * 3] * 3]


def test_a_type_that_checkpoints_do_not_have_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "file", {"a": Part(torch.zeros(4, dtype=torch.uint8), (0,), (4,))})
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b'"U8"', b'"I8"'))
    with pytest.raises(Damaged, match="a is of I8"):
        Stored(tmp_path, ["file"])


def test_parts_of_several_types_are_no_tensor(tmp_path: Path) -> None:
    for index, dtype in enumerate((torch.float32, torch.int32)):
        write_parts(tmp_path / str(index), {"a": Part(torch.zeros(2, dtype=dtype), (2 * index,), (4,))})
    with pytest.raises(Damaged, match="a of I32, elsewhere F32"):
        Stored(tmp_path, ["0", "1"])
