"""What differs between two configs: as nested mappings, so that config.json of a finished run is taken too."""

from collections.abc import Iterator, Mapping
from typing import Any


def config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """The keys whose values differ: {section: {key: (value in a, value in b)}}, a missing key as None.

    a, b: {section: {key: value}}, as asdict(JobConfig) or "config" of config.json. A section within a section gets
    the dotted name that TOML gives it: `quantize.linear.float8`. Sections and keys come in the order of a, those
    that only b has behind them.
    """
    left, right = dict(_leaves(a)), dict(_leaves(b))
    difference: dict[str, dict[str, tuple[Any, Any]]] = {}
    for section, key in dict.fromkeys([*left, *right]):
        pair = left.get((section, key)), right.get((section, key))
        if pair[0] != pair[1]:
            difference.setdefault(section, {})[key] = pair
    return difference


def _leaves(table: Mapping[str, Any], section: str = "") -> Iterator[tuple[tuple[str, str], Any]]:
    """((section, key), value) of each value that is no table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{section}.{key}" if section else key)
        else:
            yield (section, key), value
