"""Keep the code that docs/ quote equal to the code: `python docs/quote.py` rewrites the quotes.

A quote is a comment `<!-- quote FILE QUALIFIED.NAME -->` followed by a block fenced as python.
"""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
_QUOTE = re.compile(r"(<!-- quote (\S+) (\S+) -->\n```python\n)(.*?)(```)", re.DOTALL)


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
    """A page with every quote as the code is now."""
    return _QUOTE.sub(lambda m: m[1] + source_of(ROOT / m[2], m[3]) + m[5], text)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


if __name__ == "__main__":
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := requoted(text)) != text:
            page.write_text(fresh, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: quotes renewed")
