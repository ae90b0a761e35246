"""From a recipe and overrides to a JobConfig: TOML, `extends`, command line, strict in keys and types."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torchtitan_lite.config import rules
from torchtitan_lite.config.decoding import check_bounds, decode, nearest
from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Origin:
    """chain: the recipe and what it extends, the recipe first. sources: of each key that is set, the file or the
    override that has the last word."""

    chain: tuple[str, ...]
    sources: dict[str, str]

    def __str__(self) -> str:
        """`a.toml, extends base.toml`"""
        return ", extends ".join(self.chain)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a recipe with everything it extends, apply `--section.key=value` overrides, check the rules.

    Later wins: defaults, then `extends`, then the recipe, then overrides from left to right.
    Raises UserError (file, key, mend) for whatever cannot be read or must not be.
    """
    return load_traced(recipe, overrides)[0]


def load_traced(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[JobConfig, Origin]:
    """As load_config, and where each value comes from."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    chain = _layers(user_path(str(recipe), "recipe"))
    for path, table in chain:
        taken: dict[str, Any] = {}
        _take(table, JobConfig, "", str(path), taken)
        values |= taken
        sources |= dict.fromkeys(taken, str(path))
    for override in overrides:
        key, text = split_override(override)
        annotation = _annotation(key, f"--{key}")
        _take(_nest(key, _override_value(text, annotation)), JobConfig, "", "", values)
        sources[key] = override
    config: JobConfig = _build(JobConfig, "", values)
    for rule in rules.RULES:
        rule(config)
    return config, Origin(tuple(str(path) for path, _ in reversed(chain)), sources)


def refusal(key: str, value: Any) -> str | None:
    """Why the schema does not take a value for one of its keys; None where it does."""
    try:
        _take(_nest(key, value), JobConfig, "", "", {})
    except UserError as error:
        return str(error).partition(": ")[2]
    return None


def split_override(argument: str) -> tuple[str, str]:
    """`--section.key=value` as (`section.key`, `value`)."""
    key, equals, text = argument.partition("=")
    if not key.startswith("--") or "." not in key:
        raise UserError(f"argument {argument}: expected --section.key=value, as in --training.steps=100")
    if not equals:
        raise UserError(f"argument {argument}: no value; write {key}=VALUE in one word")
    return key[2:], text


def run_folder(config: JobConfig, recipe: str | Path) -> Path:
    """job.dump_folder, or outputs/ and the recipe's name."""
    return user_path(config.job.dump_folder or f"outputs/{Path(recipe).stem}", "job.dump_folder")


def user_path(text: str, where: str) -> Path:
    """A path that a user wrote, `~` expanded. Raises UserError for one that can be none."""
    if "\0" in text:
        raise UserError(f"{where}: a path cannot hold a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f'{where} = "{text}": there is no such user') from None


def _layers(recipe: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The chain of `extends` from its root down to the recipe."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    path, seen = recipe, []
    while True:
        if path.resolve() in seen:
            raise UserError(f"{recipe}: extends itself through {path}; break the circle")
        seen.append(path.resolve())
        by = f" (extended by {recipe})" if path is not recipe else ""
        table = parse_toml(read_text(path, by), f"{path}{by}")
        parent = table.pop("extends", None)
        layers.insert(0, (path, table))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise UserError(f'{path}: extends = {parent}: expected the path of one recipe, as in extends = "base.toml"')
        path = path.parent / user_path(parent, f"{path}: extends")


def read_text(path: Path, by: str = "") -> str:
    """The text of a recipe. by: who asks for it, for messages. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [p.name for p in folder.glob("*.toml")] if folder.is_dir() else []
        raise UserError(f"{path}{by}: no such recipe{nearest(path.name, names, cutoff=0.75)}") from None
    except OSError as error:
        raise UserError(f"{path}{by}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}{by}: is not UTF-8 text, so no TOML recipe") from None


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Raises UserError with the line for a text that is no TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and so is a number of 5,000 digits
        raise UserError(f"{source}: not valid TOML: {error}") from None


def _take(table: dict[str, Any], schema: type, prefix: str, source: str, values: dict[str, Any]) -> None:
    """Check every entry of `table` against `schema` and keep it in `values` under its dotted name."""
    known = {f.name: f for f in fields(schema)}
    at = f"{source}: " if source else ""
    for key, value in table.items():
        name = prefix + key
        if key not in known:
            raise UserError(f"{at}{_unknown(name, prefix, list(known))}")
        field = known[key]
        if is_dataclass(field.type):
            if not isinstance(value, dict):
                raise UserError(f"{at}{name} = {value}: is a section; write [{name}] and its keys under it")
            _take(value, field.type, name + ".", source, values)  # type: ignore[arg-type]
            continue
        where = f"{at}{name}" if source else f"--{name}"
        values[name] = decode(value, field.type, where)
        check_bounds(values[name], field.metadata, where)


def _unknown(name: str, prefix: str, siblings: list[str]) -> str:
    from torchtitan_lite.config.titan import TITAN, Dropped

    if entry := TITAN.get(name):
        told = f"here {entry.why}" if isinstance(entry, Dropped) else "not built yet"
        return f"{name} is TorchTitan's; {told}; remove it, or try `torchtitan-lite config migrate`"
    section = name if prefix else name.partition(".")[0]
    if any(key.startswith(f"{section}.") for key in TITAN):
        return f"section [{section}] is TorchTitan's; remove it, or try `torchtitan-lite config migrate`"
    return f"{'unknown key' if prefix else 'unknown section or key'} {name}{_hint(name, prefix, siblings)}"


def _hint(name: str, prefix: str, siblings: list[str]) -> str:
    """The same key in another section, a key of this section that is spelled alike, or all that there are."""
    same_key = [leaf for leaf in leaf_names(JobConfig) if "." in name and leaf.endswith("." + name.rpartition(".")[2])]
    if same_key:
        return nearest(name, same_key, cutoff=0.0)
    near = nearest(name.removeprefix(prefix).partition(".")[0], siblings, before=prefix)
    return near or f"; there are: {', '.join(siblings)}"


def leaf_names(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a section class."""
    for field in fields(schema):
        if is_dataclass(field.type):
            yield from leaf_names(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name


def _annotation(key: str, where: str) -> Any:
    schema: Any = JobConfig
    done = ""
    for part in key.split("."):
        if not is_dataclass(schema):
            raise UserError(f"{where}: {done[:-1]} is a key, not a section; write --{done[:-1]}=VALUE")
        known = {f.name: f.type for f in fields(schema)}
        if part not in known:
            raise UserError(f"{where}: {_unknown(key, done, list(known))}")
        schema, done = known[part], f"{done}{part}."
    if is_dataclass(schema):
        raise UserError(f"{where}: is a section; name one of its keys: {', '.join(leaf_names(schema, key + '.'))}")  # type: ignore[arg-type]
    return schema


def _override_value(text: str, annotation: Any) -> Any:
    """The text as TOML, or as a bare string; a string key takes it as it stands, quotes optional."""
    if annotation is str:
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _build(schema: type, prefix: str, values: dict[str, Any]) -> Any:
    arguments = {}
    for field in fields(schema):
        name = prefix + field.name
        if is_dataclass(field.type):
            arguments[field.name] = _build(field.type, name + ".", values)  # type: ignore[arg-type]
        elif name in values:
            arguments[field.name] = values[name]
    return schema(**arguments)
