"""When a checkpoint exists: a folder written under another name, listed in its manifest, then renamed. No torch.

A folder with its final name is complete by construction; whatever a killed save leaves behind has another.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FINAL = re.compile(r"step-(\d{8,})")
_BUFFER = 1 << 22


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def staging_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it exists."""
    return folder / f".step-{step:08d}.partial"


def published_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that exist in `folder`, ascending; none where the folder is missing."""
    if not folder.is_dir():
        return []
    matches = (_FINAL.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match and (folder / match[0] / MANIFEST).is_file())


def file_digests(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of the files in `folder` whose name starts with `prefix`."""
    digests = {}
    for path in sorted(folder.glob(f"{prefix}*")):
        digest = sha256()
        with path.open("rb") as handle:
            while block := handle.read(_BUFFER):
                digest.update(block)
        digests[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return digests


def damaged(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with files as a manifest lists them, a line each."""
    lines = []
    for name, listed in files.items():
        if not (folder / name).is_file():
            lines.append(f"{folder / name}: is missing")
        elif (found := file_digests(folder, name)[name]) != listed:
            lines.append(f"{folder / name}: expected {_told(listed)}, found {_told(found)}")
    return lines


def _told(entry: Mapping[str, Any]) -> str:
    return f"{entry['bytes']} bytes with SHA-256 {str(entry['sha256'])[:12]}..."


def publish(staging: Path, final: Path, contents: Mapping[str, Any]) -> None:
    """Write the manifest, which carries the SHA-256 of itself without that entry, and give the folder its name."""
    text = _canonical(contents)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({**contents, "sha256": sha256(text.encode()).hexdigest()}, indent=1))
    _sync(manifest)
    _sync(staging)
    staging.rename(final)
    _sync(final.parent)


def set_aside(folder: Path) -> Path:
    """Rename a folder that is no checkpoint to `step-N.bad`, in the place of an earlier one of that name."""
    bad = folder.with_name(f"{folder.name}.bad")
    shutil.rmtree(bad, ignore_errors=True)
    return folder.rename(bad)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError where its own checksum is not that of its contents."""
    contents: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    stated = contents.pop("sha256", None) if isinstance(contents, dict) else None
    if stated != sha256(_canonical(contents).encode()).hexdigest():
        raise ValueError(f"{folder / MANIFEST}: contents do not match their checksum")
    return contents


def prune(folder: Path, keep_latest_k: int) -> list[int]:
    """Remove all but the latest checkpoints (0 keeps all); return the steps removed."""
    for left_over in folder.glob(".step-*.removed"):  # by a removal that was cut short
        shutil.rmtree(left_over)
    removed = published_steps(folder)[:-keep_latest_k]  # [:-0] is empty
    for step in removed:
        # Renamed first: a removal that is cut short leaves no folder that looks complete.
        doomed = step_folder(folder, step).rename(folder / f".step-{step:08d}.removed")
        shutil.rmtree(doomed)
    return removed


def _canonical(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, sort_keys=True, separators=(",", ":"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
