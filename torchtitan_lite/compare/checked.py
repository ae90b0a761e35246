"""What a comparison reads of a run folder, checked where it is read: files are cut, mended by hand, or of another
version, and everything behind takes them for sound. No torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.fields import COUNT, FLAG, TABLE, TEXT, TEXTS, WHOLE, fields

MARK = "compare.json"  # in the folders of runs that a comparison has started

# Of config.json, what is computed with.
_OF_CONFIG = {
    "config.training.steps": COUNT,
    "config.training.global_batch_size": COUNT,
    "config.training.seq_len": COUNT,
    "config.training.mixed_precision_param": TEXT,
    "config.debug.seed": WHOLE,
    "config.debug.deterministic": FLAG,
    "config.model.name": TEXT,
    "config.model.flavor": TEXT,
    "config.model.converters": TEXTS,
    "config.compile.enable": FLAG,
    "config.optimizer.state_dtype": TEXT,
    "config.checkpoint.enable": FLAG,
    "world_size": COUNT,
    "identity": TABLE,
    "versions": TABLE,
}
# Of a line of metrics.jsonl: the least that a number may be. None: anything, losses being what they are.
_LEAST: dict[str, float | None] = {
    "step": 1.0,
    "loss": None,
    "grad_norm": None,
    "tokens_seen": 1.0,
    "step_time_s": 1e-9,
    "data_time_s": 0.0,
    "tps": 1e-9,
    "tflops": 0.0,
    "memory_peak_gib": 0.0,
}
CURVES = tuple(_LEAST)


def require_config(record: Mapping[str, Any], path: Path) -> None:
    """record: all of config.json. Raises UserError, which names what is wrong with it."""
    sections = {f"config.{section}": TABLE for section in record["config"]}
    fields(record, str(path), sections | _OF_CONFIG, {"filled": TEXTS})


def chain_of(record: Mapping[str, Any]) -> list[str]:
    """The recipe and what it extends, as config.json has them; nothing where it has not."""
    extends = record.get("extends")
    return [str(each) for each in (record.get("recipe"), *(extends if isinstance(extends, list) else ())) if each]


def counting(lines: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The last line of each step, as numbers; what was superseded by a resume is left out. Raises UserError."""
    kept: list[dict[str, Any]] = []
    for index, line in enumerate(lines, start=1):
        record = {name: number_of(line.get(name)) for name in _LEAST}
        lacking = [name for name, least in _LEAST.items() if not _fits(record[name], least)]
        if lacking or "mfu" not in line:
            told = ", ".join(f"{name} is {_shown(line.get(name))}" for name in lacking or ["mfu"])
            raise UserError(f"{path}, line {index}: {told}; it is not of this version, or the line is spoilt")
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append({**record, "mfu": number_of(line["mfu"])})
    return kept


def parts_of(breakdown: Any, path: Path) -> dict[str, float] | None:
    """Seconds by part of a step, None where there are none. Raises UserError."""
    if breakdown is None:
        return None
    parts = {str(name): number_of(value) for name, value in breakdown.items()} if _is_table(breakdown) else {}
    sound = {name: value for name, value in parts.items() if value is not None and math.isfinite(value)}
    if not sound or len(sound) < len(parts):
        raise UserError(f"{path}: step_breakdown is {_shown(breakdown)}, and wants a number for each part; mend it")
    return sound


def peaks_of(peaks: Any, path: Path) -> list[float] | None:
    """GiB by rank; None where they are not recorded. Raises UserError."""
    if peaks is None:
        return None
    found = [number_of(each) for each in peaks] if isinstance(peaks, list) else []
    if not found or not all(_fits(each, 0.0) for each in found):
        raise UserError(f"{path}: memory_peak_gib is {_shown(peaks)}, and wants a number for each rank; mend it")
    return [each for each in found if each is not None]


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What a comparison wrote into the folder of a run that it started; None where it did not. Raises UserError."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        mark = None
    numbers = [mark.get(name) for name in ("started", "first_step_s")] if _is_table(mark) else [math.nan]
    if not all(each is None or (type(each) in (int, float) and math.isfinite(each)) for each in numbers):
        raise UserError(f"{folder / MARK}: cannot be read as a comparison wrote it; remove the folder")
    return dict(mark)


def number_of(value: Any) -> float | None:
    """Those that are not finite are written as strings."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _fits(value: float | None, least: float | None) -> bool:
    return value is not None and (least is None or least <= value < math.inf)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _shown(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
