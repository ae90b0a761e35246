"""A field of a section, with its bounds."""

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    auto: int | None = None,
    infinite: bool | None = None,
) -> Any:
    """A field with bounds: `minimum` and `maximum` inclusive, `above` and `below` exclusive, `auto` exempt from all.

    infinite: whether inf is a value; elsewhere it is refused.
    """
    bounds = {
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "auto": auto,
        "infinite": infinite,
    }
    return field(default=default, metadata={name: value for name, value in bounds.items() if value is not None})
