"""JSON that every reader takes: it has no word for infinity and NaN, so they are written as strings."""

import json
import math
from collections.abc import Mapping
from typing import Any


def strict_dumps(value: Any, indent: int | None = None) -> str:
    """`json.dumps`, with "inf", "-inf" and "nan" for floats that are not finite. float() reads them back."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one of dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
