"""Stands in until the page is there."""

from collections.abc import Mapping
from typing import Any


def html(document: Mapping[str, Any]) -> str:
    return "<!doctype html>"
