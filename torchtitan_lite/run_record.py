"""config.json of a run folder: the resolved config and what it ran on. No torch."""

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torchtitan_lite
from torchtitan_lite.preflight import JobPlan
from torchtitan_lite.strict_json import strict_dumps

_RECORDED = ("torch", "numpy", "sentencepiece")


def write_config_json(plan: JobPlan, identity: dict[str, Any], device_name: str) -> None:
    """Write it in one move; a reader never sees half of it."""
    path = plan.folder / "config.json"
    record = {
        "recipe": str(plan.recipe),
        "config": asdict(plan.config),
        "derived": dict(plan.derived()),
        "mesh": {**plan.dims.degrees, "ep": plan.dims.ep},
        "world_size": plan.dims.world_size,
        "device": device_name,
        "versions": _versions(),
        "commit": _commit(),
        "identity": identity,
    }
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(strict_dumps(record, indent=1))
    temporary.rename(path)


def _versions() -> dict[str, str]:
    versions = {"torchtitan_lite": torchtitan_lite.__version__, "python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
