"""The text under each field of the schema, read from its source, and docs/configuration.md made from it."""

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, get_args, get_origin

from torchtitan_lite.config import optimizing, running, schema, techniques
from torchtitan_lite.config.decoding import describe

_LIMITS = {"minimum": "at least", "above": "more than", "below": "less than", "maximum": "at most"}


@cache
def field_docs() -> dict[tuple[str, str], str]:
    """(class name, field name) to the docstring under the field, on one line."""
    docs = {}
    modules = (schema, optimizing, running, techniques)
    for cls in (node for module in modules for node in ast.parse(inspect.getsource(module)).body):
        if not isinstance(cls, ast.ClassDef):
            continue
        for node, after in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[cls.name, node.target.id] = " ".join(str(after.value.value).split())
    return docs


def default_of(field: "Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def markdown() -> str:
    """docs/configuration.md, whole."""
    lines = [
        "# Configuration",
        "",
        "Generated from `torchtitan_lite/config/schema.py` by `make docs`; edit it there.",
        "",
        'A recipe is a TOML file of these sections. `extends = "other.toml"` at its top takes another recipe as the',
        "base, its path relative to the file. On the command line `--section.key=value` overrides it, the value read",
        "as TOML or as a bare string. Later wins: defaults, `extends`, recipe, command line. An unknown key or a",
        "wrong type ends with exit code 2 and a line that names it.",
    ]
    for section, cls in _headings():
        lines += [
            "",
            f"## {section}",
            "",
            f"{inspect.getdoc(cls)}",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for field in fields(cls):
            doc = field_docs()[cls.__name__, field.name].replace("|", "\\|")
            lines.append(f"| `{field.name}` | {_type(field)} | `{toml_value(default_of(field))}` | {doc} |")
    return "\n".join(lines) + "\n"


def _headings() -> Iterator[tuple[str, Any]]:
    """Sections and, behind each, its lists of tables, as TOML writes their names."""
    for section, cls in _sections(schema.JobConfig):
        yield f"[{section}]", cls
        for field in fields(cls):
            if get_origin(field.type) is list and is_dataclass(item := get_args(field.type)[0]):
                yield f"[[{section}.{field.name}]]", item


def _sections(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and classes of those sections that hold keys, not other sections."""
    for field in fields(cls):
        if is_dataclass(field.type):
            inner = list(_sections(field.type, f"{prefix}{field.name}."))
            yield from inner or [(prefix + field.name, field.type)]


def _type(field: "Field[Any]") -> str:
    bounds = field.metadata
    limits = [f"{words} {bounds[name]:g}" for name, words in _LIMITS.items() if name in bounds]
    limits += [f"or {bounds['auto']}"] if "auto" in bounds else []
    return ", ".join([describe(field.type), *limits]).replace("|", "\\|")


def toml_value(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are TOML's too
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if is_dataclass(value):
        return (
            "{ "
            + ", ".join(f"{field.name} = {toml_value(getattr(value, field.name))}" for field in fields(value))
            + " }"
        )
    return str(value)


def config_lines(config: schema.JobConfig) -> list[str]:
    """The config as TOML, a comment where a value is not the default."""
    lines: list[str] = []
    for name, cls in _sections(schema.JobConfig):
        section = attrgetter(name)(config)
        lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
        for key in fields(cls):
            value, default = getattr(section, key.name), default_of(key)
            changed = "" if value == default else f"  # default {toml_value(default)}"
            lines.append(f"{key.name} = {toml_value(value)}{changed}")
    return lines
