"""When a checkpoint exists, and whether it is what was written: folders, manifests, checksums. No torch.

A checkpoint is written under another name, listed in its manifest, then renamed: a folder with its final name is
complete by construction, and whatever a killed save leaves behind has another.
"""

import errno
import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.files import sync

MANIFEST = "manifest.json"
_FINAL = re.compile(r"step-(\d{8,})")
# The only names that a manifest may list: a name cannot lead out of the folder.
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_LEFT_OVER = re.compile(r"\.step-\d{8,}\.(partial|removed)")
_STAGES = re.compile(r"step-(\d{8,})(?:\.(bad|superseded)(?:-\d+)?)?|\.step-(\d{8,})\.(partial|removed)")
# A file that is not there, is of another kind, or that its disk does not give back.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
_BUFFER = 1 << 22
_READERS = 4  # files of one rank that are read at once
_KINDS = {
    "step": int,
    "position": int,
    "tokens_seen": int,
    "world_size": int,
    "global_batch_size": int,
    "device": str,
    "holds": str,
    "identity": dict,
    "files": dict,
}


class Damaged(ValueError):
    """A checkpoint that is not what was written; the message names the file, what was expected and what is there."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def staging_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it exists."""
    return folder / f".step-{step:08d}.partial"


def file_of(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def stage_of(name: str) -> tuple[int, str] | None:
    """Step and stage of a folder by its name: checkpoint, partial or removed (left over), bad or superseded (set
    aside); None for any other name."""
    match = _STAGES.fullmatch(name)
    return None if match is None else (int(match[1] or match[3]), match[2] or match[4] or "checkpoint")


def published_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that exist in `folder`, ascending; none where the folder is missing.

    The name alone counts: one that has lost its manifest is bad, not absent.
    """
    try:
        if not folder.is_dir():
            return []
        matches = (_FINAL.fullmatch(entry.name) for entry in folder.iterdir())
        return sorted(int(match[1]) for match in matches if match and (folder / match[0]).is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; mend the disk or permissions") from None


def why_lost(path: Path, error: OSError) -> str:
    """Why a file that cannot be read is bad. Raises UserError where it may be good: neither renamed nor passed over."""
    if error.errno in _LOST:
        return str(error.strerror)
    raise UserError(
        f"{path}: cannot be read: {error.strerror}; mend the disk or permissions, and start again"
    ) from None


def find_checkpoint(path: str) -> Path:
    """The checkpoint that checkpoint.initial_load_path names: that folder, or the latest in it. Raises UserError."""
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        return folder
    if steps := published_steps(folder):
        return step_folder(folder, steps[-1])
    raise UserError(f'checkpoint.initial_load_path = "{path}": is neither a checkpoint nor a folder of some')


def take_away_left_overs(folder: Path) -> list[str]:
    """Remove what saves and removals that were killed left in `folder`; return the names."""
    names = sorted(e.name for e in folder.iterdir() if _LEFT_OVER.fullmatch(e.name)) if folder.is_dir() else []
    for name in names:
        shutil.rmtree(folder / name)
    return names


def publish(staging: Path, final: Path, contents: Mapping[str, Any]) -> None:
    """Write the manifest, which carries the SHA-256 of itself without that entry, and give the folder its name."""
    text = _canonical(contents)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({**contents, "sha256": sha256(text.encode()).hexdigest()}, indent=1))
    sync(manifest)
    sync(staging)
    if final.exists():  # of an attempt that this one supersedes
        set_aside(final, "superseded")
    staging.rename(final)
    sync(final.parent)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder to `NAME.why`, or with a number where there is one of that name; return where it is now."""
    number, aside = 1, folder.with_name(f"{folder.name}.{why}")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}-{number}")
    return folder.rename(aside)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises Damaged where it is not one, or not of this folder."""
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise Damaged(f"{path}: is no plain file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {why_lost(path, error)}") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: is not UTF-8: {error}") from None
    try:
        return _checked_manifest(path, json.loads(text))
    except RecursionError:
        raise Damaged(f"{path}: is nested too deep") from None
    except json.JSONDecodeError as error:
        raise Damaged(f"{path}: is not JSON: {error}") from None


def damages(
    folder: Path, files: Mapping[str, Mapping[str, Any]], on_read: Callable[[int], object] = lambda count: None
) -> list[str]:
    """What is wrong with files as a manifest lists them, a line each: file, expected, found.

    on_read: is told, in several threads, how many bytes have been read since.
    """
    given_up = Event()

    def told(count: int) -> None:
        if given_up.is_set():
            raise CancelledError
        on_read(count)

    with ThreadPoolExecutor(_READERS) as readers:
        try:
            found = readers.map(lambda item: _damage(folder / item[0], item[1], told), files.items())
            return [line for line in found if line]
        finally:
            given_up.set()  # a Ctrl-C does not wait for the end of large files


def share(files: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The files of a manifest that one rank of several verifies."""
    return {name: files[name] for name in sorted(files)[rank::ranks]}


def verified(
    folder: Path, on_read: Callable[[int], object] = lambda count: None, *, rank: int = 0, ranks: int = 1
) -> list[str]:
    """What is wrong with a checkpoint, a rank's share of its files, a line each; none where it is good.

    on_read: as in damages.
    """
    try:
        return damages(folder, share(read_manifest(folder)["files"], rank, ranks), on_read)
    except Damaged as damage:
        return [str(damage)]


def prune(folder: Path, keep_latest_k: int) -> list[int]:
    """Remove all but the latest complete checkpoints (0 keeps all); return the steps removed.

    Complete is what has all its files in their sizes: checksums would read every one of them at each save. Incomplete
    ones neither count nor go. The last one that a run can be resumed from stays.
    """
    if keep_latest_k == 0:
        return []
    holds = {step: what for step in published_steps(folder) if (what := _complete(step_folder(folder, step)))}
    kept = sorted(holds)[-keep_latest_k:]
    kept += [step for step in sorted(holds) if holds[step] == "all"][-1:]
    removed = [step for step in sorted(holds) if step not in kept]
    for step in removed:
        # Renamed first: a removal that is cut short leaves no folder that looks complete.
        doomed = step_folder(folder, step).rename(folder / f".step-{step:08d}.removed")
        shutil.rmtree(doomed)
    return removed


def hasher() -> Any:
    """XXH3 with 128 bits: as fast as memory, so that checksums cost next to nothing beside the disk."""
    import xxhash

    return xxhash.xxh3_128()


def _checked_manifest(path: Path, contents: Any) -> dict[str, Any]:
    stated = contents.pop("sha256", None) if isinstance(contents, dict) else None
    if stated != (found := sha256(_canonical(contents).encode()).hexdigest()):
        raise Damaged(f"{path}: expected SHA-256 {str(stated)[:12]}..., found {found[:12]}...: it was changed by hand")
    for key, kind in _KINDS.items():
        if type(value := contents.get(key)) is not kind or (isinstance(value, int) and value < 0):
            least = ", at least 0" if kind is int else ""
            raise Damaged(f"{path}: expected {key} of type {kind.__name__}{least}, found {value!r:.40}")
    if (final := _FINAL.fullmatch(path.parent.name)) and int(final[1]) != contents["step"]:
        raise Damaged(f"{path}: expected step {int(final[1])} by its folder's name, found {contents['step']}")
    _require_plain_files(path, contents["files"])
    return dict(contents)


def _complete(folder: Path) -> str | None:
    """What a checkpoint holds ("all" or "model"); None where a file is missing or has another size."""
    try:
        manifest = read_manifest(folder)
        sizes = [(folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()]
    except (Damaged, OSError):
        return None
    return str(manifest["holds"]) if all(sizes) else None


def _damage(path: Path, listed: Mapping[str, Any], on_read: Callable[[int], object]) -> str | None:
    expected = f"expected {listed['bytes']} bytes with XXH3 {listed['xxh3_128'][:12]}..."
    try:
        if not stat.S_ISREG((about := path.stat()).st_mode):
            return f"{path}: {expected}, found no plain file"
        if (size := about.st_size) != listed["bytes"]:
            return f"{path}: {expected}, found {size} bytes"
        digest, block = hasher(), memoryview(bytearray(_BUFFER))
        with path.open("rb", buffering=0) as handle:
            while count := handle.readinto(block):
                digest.update(block[:count])
                on_read(count)
    except FileNotFoundError:
        return f"{path}: {expected}, found no such file"
    except OSError as error:
        return f"{path}: {expected}, cannot be read: {why_lost(path, error)}"
    found = digest.hexdigest()
    return None if found == listed["xxh3_128"] else f"{path}: {expected}, found XXH3 {found[:12]}..."


def _require_plain_files(path: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise Damaged(f"{path}: lists a file {name!r:.60}, expected names such as {file_of(0)}")
        shape = {"bytes": int, "xxh3_128": str}
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != shape:
            raise Damaged(f"{path}: expected bytes and xxh3_128 of {name}, found {entry!r:.60}")


def _canonical(contents: Any) -> str:
    return json.dumps(contents, sort_keys=True, separators=(",", ":"))
