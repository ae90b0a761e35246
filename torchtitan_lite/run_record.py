"""What a run says of itself: config.json, the head of its manifests, and how it was stopped. No torch."""

import json
import platform
import subprocess
import time
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torchtitan_lite
from torchtitan_lite.errors import UserError
from torchtitan_lite.fields import TEXT, WHOLE, fields
from torchtitan_lite.files import replace
from torchtitan_lite.preflight import JobPlan
from torchtitan_lite.strict_json import strict_dumps

STOPPED = "stopped.json"
_STOPPED_MEND = "remove it, the step that is saved stays"
_RECORDED = ("torch", "numpy", "sentencepiece", "safetensors")


def write_config_json(plan: JobPlan, identity: dict[str, Any], device_name: str) -> None:
    record = {
        "recipe": str(plan.recipe),
        "extends": list(plan.origin.chain[1:]),
        "config": asdict(plan.config),
        "derived": dict(plan.derived()),
        "filled": list(plan.filled),
        "mesh": {**plan.dims.degrees, "ep": plan.dims.ep},
        "world_size": plan.dims.world_size,
        "device": device_name,
        "versions": versions(),
        "commit": commit(),
        "identity": identity,
    }
    replace(plan.folder / "config.json", strict_dumps(record, indent=1))


def manifest_record(plan: JobPlan, identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that saved it."""
    config = strict_dumps(asdict(plan.config))
    return {
        "mesh": {**plan.dims.degrees, "ep": plan.dims.ep},
        "global_batch_size": plan.config.training.global_batch_size,
        "config_sha256": sha256(config.encode()).hexdigest(),
        "versions": versions(),
        "identity": json.loads(json.dumps(identity)),
    }


def write_stopped(folder: Path, **how: Any) -> None:
    """Mark that a run ended as a signal asked it to: step, signal, saved (its checkpoint's step, None without)."""
    try:
        replace(folder / STOPPED, strict_dumps({**how, "time": time.time()}, indent=1))
    except OSError as error:
        raise UserError(
            f"{folder / STOPPED}: cannot be written: {error.strerror}; the step is saved all the same: make room or "
            "mend the folder, and start again"
        ) from None


def read_stopped(folder: Path) -> dict[str, Any] | None:
    """What write_stopped left; None where the run has gone on since, or did not end so. Raises UserError where it
    cannot be read."""
    try:
        record = json.loads((folder / STOPPED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{folder / STOPPED}: cannot be read, or is not JSON; {_STOPPED_MEND}") from None
    needed, known = {"signal": TEXT, "step": WHOLE}, {"saved": WHOLE}
    return fields(record, str(folder / STOPPED), needed, known, _STOPPED_MEND)


def clear_stopped(folder: Path) -> None:
    (folder / STOPPED).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of what computes, by name; `unknown` for what is not installed as a package."""
    found = {"torchtitan_lite": torchtitan_lite.__version__, "python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
