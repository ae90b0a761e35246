"""What is in a folder of checkpoints, for people and for `--json`. It reads and changes nothing. No torch."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

from torchtitan_lite.checkpoint import storage
from torchtitan_lite.checkpoint.header import Chunk, chunks_of
from torchtitan_lite.checkpoint.storage import Damaged
from torchtitan_lite.errors import UserError
from torchtitan_lite.strict_json import flat, strict_dumps

_GIB, _GB = 1 << 30, 10**9
_KINDS = ("model", "optimizer", "rng", "faults")  # what a tensor's name begins with
_FIRST = ("step", "position", "tokens_seen", "holds", "world_size", "mesh", "device", "global_batch_size")
_NOT_ONE = {
    "partial": "left over: a save that was cut short, or is being written",
    "removed": "left over: a removal that was cut short",
    "bad": "set aside: was found bad",
    "superseded": "set aside: a run went another way from an earlier step",
}


def run(action: str, path: str, as_json: bool) -> int:
    """List, verify or inspect what is at `path`, on stdout; return the exit code: 0, or 1 where something is bad.

    Raises UserError where there is no checkpoint.
    """
    try:
        return {"list": _list, "verify": _verify, "inspect": _inspect}[action](path, as_json)
    except Damaged as damage:
        print(_plain(UserError(str(damage)).line()), file=sys.stderr)
        return 1


def _found_at(path: str) -> list[tuple[int, str, Path]]:
    """(step, stage, folder) of all that is, was or was to be a checkpoint, oldest first; of one where `path` is that.

    path: a checkpoint, a folder of some, or a run folder. Raises UserError.
    """
    here = Path(path).expanduser()
    try:
        if here.is_dir() and ((stage := storage.stage_of(here.resolve().name)) or (here / storage.MANIFEST).is_file()):
            return [(*(stage or (0, "checkpoint")), here)]  # under whatever name it was copied to
        for folder in (here, here / _folder_of_run(here)):
            entries = folder.iterdir() if folder.is_dir() else ()
            if found := [(*stage, entry) for entry in entries if (stage := storage.stage_of(entry.name))]:
                return sorted(found)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    why = "has no checkpoints" if here.is_dir() else "no such folder"
    raise UserError(f"{_plain(path)}: {why}; name a checkpoint, a folder of some, or a run folder")


def _checkpoints_at(path: str) -> list[Path]:
    """Those of _found_at that have their final name, or the one that `path` names."""
    found = _found_at(path)
    whole = [folder for _, stage, folder in found if stage == "checkpoint"]
    if not whole and len(found) == 1 and found[0][2] == Path(path).expanduser():
        return [found[0][2]]
    if not whole:
        raise UserError(f"{_plain(path)}: has no checkpoints, only what is left over or set aside; list shows it")
    return whole


def _folder_of_run(run_folder: Path) -> str:
    config = run_folder / "config.json"
    if not config.is_file():
        return "checkpoint"
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["config"]["checkpoint"]["folder"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{config}: does not say checkpoint.folder; name the folder of checkpoints itself") from None


def _list(path: str, as_json: bool) -> int:
    rows = [_row(*found) for found in _found_at(path)]
    if as_json:
        print(strict_dumps(rows, indent=1))
        return 0
    table = [("name", "holds", "saved", "ranks", "mesh", "GiB", "files", "complete")]
    for row in rows:
        saved = "-" if row["saved"] is None else f"{datetime.fromtimestamp(row['saved']):%Y-%m-%d %H:%M:%S}"
        facts = (row["holds"], saved, row["world_size"], _mesh(row["mesh"]))
        state = _NOT_ONE.get(row["stage"]) or ("yes" if row["complete"] else f"no: {row['why']}")
        table.append((row["name"], *map(_cell, facts), f"{row['bytes'] / _GIB:.3f}", str(row["files"]), _plain(state)))
    _print_table(table, right=(3, 5, 6))
    return 0


def _row(step: int, stage: str, folder: Path) -> dict[str, Any]:
    """What is known of a folder from its manifest and its files' sizes. saved: seconds since 1970; bytes: on disk."""
    sizes = _sizes(folder)
    row: dict[str, Any] = {
        "path": str(folder),
        "name": folder.name,
        "step": step,
        "stage": stage,
        "holds": None,
        "saved": None,
    }
    row |= {"world_size": None, "mesh": None, "bytes": sum(sizes.values()), "files": len(sizes)}
    try:
        manifest = storage.read_manifest(folder)
    except Damaged as damage:
        return {**row, "complete": False, "why": str(damage)}
    row |= {key: manifest.get(key) for key in ("step", "holds", "world_size", "mesh")}
    row["saved"] = (folder / storage.MANIFEST).stat().st_mtime
    lacking = [
        f"{name}: expected {entry['bytes']} bytes, found " + (f"{sizes[name]}" if name in sizes else "no such file")
        for name, entry in manifest["files"].items()
        if sizes.get(name) != entry["bytes"]
    ]
    return {**row, "complete": stage == "checkpoint" and not lacking, "why": lacking[0] if lacking else None}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of ranks in a folder; none where it is gone meanwhile."""
    try:
        return {file.name: file.stat().st_size for file in folder.glob("rank-*") if file.is_file()}
    except FileNotFoundError:
        return {}


def _verify(path: str, as_json: bool) -> int:
    from tqdm import tqdm

    found = _checkpoints_at(path)
    rows, started = [], time.perf_counter()
    with tqdm(
        total=sum(sum(_sizes(folder).values()) for folder in found),
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    ) as bar:
        count = _Count(bar.update)
        for checkpoint in found:
            before = count.bytes
            damages = storage.verified(checkpoint, count.add)
            state = "good" if not damages else "bad" if checkpoint.is_dir() else "gone"
            rows.append({"path": str(checkpoint), "state": state, "bytes": count.bytes - before, "damages": damages})
            if not as_json:
                for line in _verdict(rows[-1]):
                    tqdm.write(line)
    seconds = time.perf_counter() - started
    good, bad = (sum(row["state"] == state for row in rows) for state in ("good", "bad"))
    if as_json:
        told = {"checkpoints": rows, "bytes": count.bytes, "seconds": seconds, "good": good, "bad": bad}
        print(strict_dumps(told, indent=1))
    else:
        rate = f"{count.bytes / _GIB:.3f} GiB in {seconds:.2f} s, {count.bytes / _GB / seconds:.2f} GB/s"
        print(f"{good} good, {bad} bad; read {rate}")
    return 1 if bad else 0


class _Count:
    """Bytes read by several threads."""

    def __init__(self, tell: Any) -> None:
        self.bytes, self._tell, self._lock = 0, tell, Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            self._tell(count)


def _verdict(row: Mapping[str, Any]) -> Iterator[str]:
    if row["state"] == "bad":
        yield from (_plain(f"bad   {damage}") for damage in row["damages"])
    else:
        yield _plain(f"{row['state']:<4}  {row['path']}" + (": removed meanwhile" if row["state"] == "gone" else ""))


def _inspect(path: str, as_json: bool) -> int:
    folder = _checkpoints_at(path)[-1]
    manifest = storage.read_manifest(folder)
    tensors = _tensors(folder, sorted(manifest["files"]))
    totals: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        first = tensor["name"].partition(".")[0]
        total = totals.setdefault(first if first in _KINDS else "other", {"tensors": 0, "numbers": 0, "bytes": 0})
        for key, more in (("tensors", 1), ("numbers", prod(tensor["shape"])), ("bytes", tensor["bytes"])):
            total[key] += more
    try:
        told = {**manifest, "mesh": _mesh(manifest.get("mesh"))}
        facts = flat({key: value for key, value in told.items() if key != "files"})
        if as_json:
            print(strict_dumps({"path": str(folder), **manifest, "tensors": tensors, "totals": totals}, indent=1))
            return 0
    except RecursionError:
        raise Damaged(f"{folder / storage.MANIFEST}: is nested too deep") from None
    print(_plain(str(folder)))
    width = min(40, max(len(_plain(key)) for key in facts))
    for key in (*_FIRST, *sorted(facts.keys() - set(_FIRST))):
        if key in facts:
            print(f"  {_plain(key):<{width}}  {_cell(facts[key])}")
    print()
    shapes = [(t["name"], t["dtype"], _shape(t["shape"]), str(t["parts"]), f"{t['bytes']:,}") for t in tensors]
    _print_table([("tensor", "dtype", "shape", "parts", "bytes"), *shapes], right=(3, 4))
    print()
    kinds = [(k, f"{t['tensors']:,}", f"{t['numbers']:,}", f"{t['bytes'] / _GIB:.3f}") for k, t in totals.items()]
    _print_table([("kind", "tensors", "numbers", "GiB"), *kinds], right=(1, 2, 3))
    return 0


def _tensors(folder: Path, files: Sequence[str]) -> list[dict[str, Any]]:
    """The tensors in a checkpoint by the headers of its files. Raises Damaged where their parts do not make wholes."""
    chunks: dict[str, list[Chunk]] = {}
    for file in files:
        for chunk in chunks_of(folder / file):
            chunks.setdefault(chunk.name, []).append(chunk)
    for name, parts in chunks.items():
        first, numbers = parts[0], sum(prod(part.size) for part in parts)
        if other := next((p for p in parts if (p.shape, p.dtype) != (first.shape, first.dtype)), None):
            told = [f"{_shape(part.shape)} of {part.dtype}" for part in (first, other)]
            raise Damaged(f"{other.path}: {name}: expected {told[0]} as in {first.path.name}, found {told[1]}")
        if numbers != prod(first.shape):
            raise Damaged(f"{folder}: {name}: expected all of {_shape(first.shape)}, found {numbers} numbers of it")
    return [
        {
            "name": name,
            "dtype": parts[0].dtype,
            "shape": list(parts[0].shape),
            "parts": len(parts),
            "bytes": sum(part.bytes for part in parts),
        }
        for name, parts in sorted(chunks.items())
    ]


def _print_table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    """Columns under each other; those in `right` end together."""
    rows = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def _shape(shape: Sequence[int]) -> str:
    return f"{' x '.join(map(str, shape)) or 'one number':.80}"


def _mesh(mesh: Any) -> str | None:
    """Axes of a degree above 1, as a run names them."""
    if not isinstance(mesh, dict):
        return None
    return " x ".join(f"{axis} {degree}" for axis, degree in mesh.items() if degree != 1) or "1 rank"


def _cell(value: Any) -> str:
    return "-" if value is None else _plain(str(value))


def _plain(text: str) -> str:
    """Text that cannot steer a terminal, whatever a file says."""
    return text if text.isprintable() else ascii(text)[1:-1]
