"""`torchtitan-lite config migrate OLD [--out NEW]`: a recipe of TorchTitan 0.2.x as one of ours."""

import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchtitan_lite.config.loading import read_text, user_path
from torchtitan_lite.config.migration import Migration, migrate
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import plan_smallest
from torchtitan_lite.strict_json import strict_dumps


def run(old: str, out: str | None, *, as_json: bool) -> int:
    """Write the new recipe to `out` or stdout, what became of each key to stderr; return the exit code.

    Raises UserError for what cannot be read, is no TOML, or would be written over.
    """
    path = user_path(old, "recipe")
    target = user_path(out, "--out") if out else None
    if target is not None and target.exists():
        raise UserError(f"--out {target}: is there already; choose another name or remove it")
    moved = migrate(read_text(path), str(path))
    accepted = check(moved.text)
    if target is not None:
        try:
            target.write_text(moved.text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {target}: cannot be written: {error.strerror}") from None
    if as_json:
        keys = [asdict(each) for each in moved.told]
        print(strict_dumps({"recipe": moved.text, "out": out, "keys": keys, "check": accepted}, indent=1))
    elif target is None:
        print(moved.text, end="")
    for line in told(moved, accepted):
        print(line, file=sys.stderr)
    return 0


def check(text: str) -> dict[str, Any]:
    """What `config check` says of a recipe: {"ok", "mesh", "error", "warnings"}."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        try:
            plan = plan_smallest(path)
        except UserError as error:
            return {"ok": False, "mesh": None, "error": str(error).removeprefix(f"{path}: "), "warnings": []}
    return {"ok": True, "mesh": str(plan.dims), "error": None, "warnings": plan.warnings()}


def told(moved: Migration, accepted: dict[str, Any]) -> list[str]:
    """A line for each key that did not stay as it was, and the verdict."""
    plain = sum(each.action == "kept" and not each.told for each in moved.told)
    lines = [f"kept     {plain} keys as they are"]
    for each in moved.told:
        if each.told or each.action != "kept":
            lines.append(f"warning: {each.line()}" if each.warning else each.line())
    if accepted["ok"]:
        lines += [f"warning: {warning}" for warning in accepted["warnings"]]
        lines.append(f"check    `config check` accepts it: {accepted['mesh']}")
    else:
        lines.append(f"warning: check    `config check` refuses it: {accepted['error']}")
    return lines
