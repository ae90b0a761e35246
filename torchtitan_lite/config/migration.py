"""A recipe of TorchTitan 0.2.x as one of ours: every key kept, renamed, changed or left out, none without a word."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any, Literal

from torchtitan_lite.config.decoding import nearest
from torchtitan_lite.config.document import toml_value
from torchtitan_lite.config.loading import leaf_names, parse_toml, refusal
from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.config.statements import Statement, statements
from torchtitan_lite.config.titan import (
    ADDED,
    DEFAULTS,
    OF_MODELS,
    TITAN,
    Changed,
    Dropped,
    Entry,
    Kept,
    Old,
    Renamed,
)

OURS = frozenset(leaf_names(JobConfig))
_SECTIONS = frozenset(name[:end] for name in OURS for end, letter in enumerate(name) if letter == ".")
_WIDTH = 110

Action = Literal["kept", "changed", "renamed", "dropped", "unknown", "added", "default"]


@dataclass(frozen=True)
class Told:
    """What became of a key. to: the keys and values that took its place, none where it is left out.

    warning: whether the run is another without it, or may be.
    """

    key: str
    action: Action
    value: Any
    to: dict[str, Any]
    told: str
    warning: bool = False

    def line(self) -> str:
        """In one line, for the terminal."""
        shown = self.key if self.value is None else f"{self.key} = {toml_value(self.value)}"
        others = {key: value for key, value in self.to.items() if (key, value) != (self.key, self.value)}
        arrow = " -> " + ", ".join(f"{key} = {toml_value(value)}" for key, value in others.items()) if others else ""
        return f"{self.action:<8} {shown}{arrow}" + (f": {self.told}" if self.told else "")


@dataclass(frozen=True)
class Migration:
    """text: the new recipe. told: of each old key in its order, then of what was added and of other defaults."""

    text: str
    told: list[Told]


@dataclass
class _Block:
    """A section of the new recipe. end: where its last key ends, comments and blank lines behind it left out."""

    section: str
    lines: list[str] = field(default_factory=list)
    end: int = 0

    def take(self, lines: list[str], *, key: bool) -> None:
        self.lines += lines
        if key:
            self.end = len(self.lines)


def entry_of(key: str) -> Entry | None:
    """What the table says of a key, but that one which the schema lacks cannot be kept; None of no key of
    TorchTitan's."""
    entry = TITAN.get(key)
    if isinstance(entry, Kept) and key not in OURS:
        return Dropped("not built yet")
    return entry


def migrate(text: str, source: str) -> Migration:
    """The recipe `text` of TorchTitan 0.2.x, read from `source`, as one of ours. Raises UserError for no valid TOML."""
    old = _flat_old(text, source)
    told: list[Told] = []
    blocks = [_Block("")]
    elsewhere: list[Told] = []
    for statement in statements(text):
        if statement.kind == "header":
            blocks.append(_Block(statement.section))
            known = statement.section in _SECTIONS and not statement.lines[0].strip().startswith("[[")
            blocks[-1].take(list(statement.lines) if known else _commented(statement.lines), key=True)
        elif statement.kind != "pair":
            blocks[-1].take(list(statement.lines), key=False)
        else:
            found = [_became(_joined(statement.section, key), value, old) for key, value in statement.leaves.items()]
            blocks[-1].take(_rewritten(statement, found), key=True)
            told += found
            elsewhere += [each for each in found if any(key != each.key for key in each.to)]
    added = [
        Told(key, "added", value, {key: value}, why)
        for key, (value, why, when) in ADDED.items()
        if key not in old and when(old)
    ]
    dotted = {key.rpartition(".")[0] for key in old}  # where no header has them
    for each in elsewhere + added:
        _place(each, blocks, dotted)
    lines = [line for block in blocks for line in block.lines]
    return Migration("\n".join(lines).rstrip("\n") + "\n", told + added + list(_defaults(old)))


def _flat_old(text: str, source: str) -> dict[str, Any]:
    parse_toml(text, source)
    return {
        _joined(statement.section, key): value
        for statement in statements(text)
        for key, value in statement.leaves.items()
    }


def _joined(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _became(key: str, value: Any, old: Old) -> Told:
    entry = entry_of(key)
    if entry is None:
        return _unknown(key, value, old)
    if isinstance(entry, Dropped):
        return Told(key, "dropped", value, {}, entry.why, warning=not entry.unless(value, old))
    if isinstance(entry, Renamed):
        return _renamed(key, value, entry.to, old)
    if isinstance(entry, Changed) and entry.when(value, old):
        to = {key: value} if entry.to is None else entry.to(value, old)
        if clash := [other for other in to if other != key and other in old]:
            to = {other: new for other, new in to.items() if other not in clash}
        if reasons := [reason for other, new in to.items() if (reason := refusal(other, new)) is not None]:
            return Told(key, "dropped", value, {}, reasons[0], warning=True)
        return Told(key, "changed" if to else "dropped", value, to, entry.told, warning=entry.loses)
    return _kept(key, value)


def _kept(key: str, value: Any) -> Told:
    if (reason := refusal(key, value)) is None:
        return Told(key, "kept", value, {key: value}, "")
    if type(value) is int and refusal(key, str(value)) is None:
        return Told(key, "changed", value, {key: str(value)}, "a string here")
    return Told(key, "dropped", value, {}, reason, warning=True)


def _renamed(key: str, value: Any, to: str, old: Old) -> Told:
    if to in old:
        return Told(key, "dropped", value, {}, f"{to} is set too, and counts", warning=True)
    if (reason := refusal(to, value)) is not None:
        return Told(key, "dropped", value, {}, reason, warning=True)
    return Told(key, "renamed", value, {to: value}, "")


def _unknown(key: str, value: Any, old: Old) -> Told:
    if to := OF_MODELS.get(key.rpartition(".")[2]):
        return _renamed(key, value, to, old)
    if key in OURS and refusal(key, value) is None:
        return Told(key, "kept", value, {key: value}, "no key of TorchTitan 0.2.2, and one here")
    section, _, name = key.rpartition(".")
    alike = [other for other in TITAN if other.rpartition(".")[2] == name]
    beside = [other.rpartition(".")[2] for other in TITAN if other.rpartition(".")[0] == section]
    hint = nearest(key, alike, cutoff=0.0) or nearest(name, beside, before=f"{section}.")
    if not beside:
        hint = hint or nearest(section, sorted({other.rpartition(".")[0] for other in TITAN}), cutoff=0.8)
    return Told(key, "unknown", value, {}, f"no key of TorchTitan 0.2.2{hint}", warning=True)


def _rewritten(statement: Statement, found: list[Told]) -> list[str]:
    """The lines of a statement in the new recipe: as they were where nothing changed, else key by key."""
    one = len(found) == 1 and "{" not in statement.lines[0]  # an inline table may get more keys, and is written out
    if one and found[0].to == {found[0].key: found[0].value}:
        return [*(_comment(found[0].action, found[0].told) if found[0].told else []), *statement.lines]
    lines: list[str] = []
    for each in found:
        name = each.key.removeprefix(statement.section).removeprefix(".")
        left_out = _commented(statement.lines if len(found) == 1 else [f"{name} = {toml_value(each.value)}"])
        if each.key not in each.to:
            where = f" to {', '.join(each.to)}" if each.to else ""
            lines += [*_comment(f"{each.action}{where}", each.told), *left_out]
            continue
        was = "" if each.to[each.key] == each.value else f" from {toml_value(each.value)}"
        lines += _comment(f"{each.action}{was}", each.told) if each.told else []
        lines.append(f"{name} = {toml_value(each.to[each.key])}")
    return lines or _commented(statement.lines)


def _place(each: Told, blocks: list[_Block], dotted: set[str]) -> None:
    """Write what a key became in another section, or what was added, behind the last key of that section.

    dotted: sections whose keys may stand at the top as dotted ones; no header may follow those.
    """
    for key, value in each.to.items():
        if key == each.key and each.action != "added":
            continue
        section, _, name = key.rpartition(".")
        block = next((block for block in blocks if block.section == section), None)
        if block is None and section in dotted:
            block, name = blocks[0], key
        if block is None:
            blocks[-1].lines = [*_stripped(blocks[-1].lines), ""]
            block = _Block(section, [f"[{section}]"], 1)
            blocks.append(block)
        reason = each.told if each.action == "added" else f"from {each.key}"
        lines = [*_comment("added" if each.action == "added" else "moved", reason), f"{name} = {toml_value(value)}"]
        block.lines[block.end : block.end] = lines
        block.end += len(lines)


def _defaults(old: Old) -> Iterator[Told]:
    for key, (there, here, when) in DEFAULTS.items():
        if key not in old and when(old):
            yield Told(key, "default", None, {}, f"{there} in TorchTitan; here {here}")


def _comment(action: str, told: str) -> list[str]:
    text = f"{action}: {told}" if told else action
    return wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False
    )


def _commented(lines: list[str] | tuple[str, ...]) -> list[str]:
    return [f"# {line}" for line in lines]


def _stripped(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines
