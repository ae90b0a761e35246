"""`--vary section.key=a,b,c`, several at once: every combination, as overrides of one recipe. No torch."""

from collections.abc import Sequence
from itertools import product

from torchtitan_lite.compare.sides import Source
from torchtitan_lite.config.loading import split_override
from torchtitan_lite.errors import UserError

_MOST = 64


def combinations(recipe: str, varied: Sequence[str]) -> list[Source]:
    """In the order of the values, the last key's running fastest. Raises UserError."""
    axes = [_axis(text) for text in varied]
    keys = [key for key, _ in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--vary {twice[0]}: named twice; give all its values at once")
    found = [
        Source(
            recipe,
            tuple(f"--{key}={value}" for key, value in zip(keys, values, strict=True)),
            ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True)),
        )
        for values in product(*(values for _, values in axes))
    ]
    if len(found) > _MOST:
        raise UserError(f"--vary asks for {len(found)} recipes, {_MOST} at most are compared; leave some values out")
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    key, values = split_override(f"--{text.removeprefix('--')}")
    if key == "debug.seed":
        raise UserError("--vary debug.seed: repeats have seeds of their own; ask for more of them with --repeats")
    parts = _split(values)
    if len(parts) < 2:
        raise UserError(f"--vary {text}: one value varies nothing; separate several with commas, as in {key}=1,2,4")
    if not all(parts):
        raise UserError(f"--vary {text}: a value is empty; separate values with one comma")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise UserError(f"--vary {text}: {twice[0]} is named twice")
    return key, parts


def _split(text: str) -> list[str]:
    """At commas, but for those within brackets or quotes, which are parts of a value."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{(") - (character in ")}]")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
