"""Keep what docs/ quote of code and recipes equal to them: `python docs/quote.py` rewrites the quotes.

A quote is a comment `<!-- quote FILE QUALIFIED.NAME -->` followed by a block fenced as python; the table of recipes
and that of TorchTitan's keys stand between two comments each.
"""

import ast
import re
import textwrap
from pathlib import Path

from torchtitan_lite.config.migration import entry_of
from torchtitan_lite.config.titan import TITAN, Changed, Dropped, Kept, Renamed
from torchtitan_lite.preflight import plan_job

ROOT = Path(__file__).parent.parent
_QUOTE = re.compile(r"(<!-- quote (\S+) (\S+) -->\n```python\n)(.*?)(```)", re.DOTALL)

_TABLE = re.compile(r"(<!-- recipes: generated .*? -->\n)(.*?)(<!-- recipes: end -->)", re.DOTALL)
_KEYS = re.compile(r"(<!-- keys of TorchTitan: generated .*? -->\n)(.*?)(<!-- keys of TorchTitan: end -->)", re.DOTALL)
_FIELD = re.compile(r"^# ([A-Z][a-z ]+): +(.*(?:\n# {12,}.*)*)", re.MULTILINE)


def source_of(path: Path, name: str) -> str:
    """The source of a function or class by its qualified name, dedented."""
    text = path.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        (node,) = [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part]
        body = node.body
    lines = text.splitlines(keepends=True)
    return textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))


def requoted(text: str) -> str:
    """A page with every quote as the code is now, and the table as the recipes are."""
    text = _QUOTE.sub(lambda m: m[1] + source_of(ROOT / m[2], m[3]) + m[5], text)
    text = _KEYS.sub(lambda m: m[1] + key_table() + m[3], text)
    return _TABLE.sub(lambda m: m[1] + recipe_table() + m[3], text)


def large_recipes() -> list[Path]:
    """Those for GPUs; the others have debug in their names."""
    return sorted(path for path in (ROOT / "train_configs").glob("*.toml") if "debug" not in path.stem)


def header(recipe: Path) -> dict[str, str]:
    """The fields at the top of a recipe for GPUs, as in `# World size: 8`."""
    return {name: re.sub(r"\s*\n# +", " ", value) for name, value in _FIELD.findall(recipe.read_text("utf-8"))}


def recipe_table() -> str:
    """The smallest first."""
    rows = ["| recipe | ranks | a step | shows | published |", "|---|---|---|---|---|"]
    plans = [(plan_job(recipe, (), int(header(recipe)["World size"])), header(recipe)) for recipe in large_recipes()]
    for plan, told in sorted(plans, key=lambda entry: entry[0].dims.world_size):
        step = f"{plan.batch.global_batch_size} x {plan.config.training.seq_len:,} tokens"
        name = f"[{plan.recipe.stem}](../train_configs/{plan.recipe.name})"
        rows.append(f"| {name} | {plan.dims} | {step} | {told['Shows']} | {told['Published']} |")
    return "\n".join(rows) + "\n"


def key_table() -> str:
    """What becomes of every key of TorchTitan's, section by section; those that stay in one row."""
    rows: dict[str, list[str]] = {}
    kept: dict[str, list[str]] = {}
    for key in TITAN:
        section, _, name = key.rpartition(".")
        entry = entry_of(key)
        if isinstance(entry, Kept):
            kept.setdefault(section, []).append(f"`{name}`")
        elif isinstance(entry, Renamed):
            rows.setdefault(section, []).append(f"| `{key}` | renamed | `{entry.to}` |")
        elif isinstance(entry, Changed):
            rows.setdefault(section, []).append(f"| `{key}` | changed | {entry.told} |")
        elif isinstance(entry, Dropped):
            rows.setdefault(section, []).append(f"| `{key}` | dropped | {entry.why} |")
    lines = ["| key | | |", "|---|---|---|"]
    for section in dict.fromkeys(key.rpartition(".")[0] for key in TITAN):
        if section in kept:
            lines.append(f"| `[{section}]` | kept | {', '.join(kept[section])} |")
        lines += rows.get(section, [])
    return "\n".join(lines) + "\n"


def pages() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


if __name__ == "__main__":
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := requoted(text)) != text:
            page.write_text(fresh, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: quotes renewed")
