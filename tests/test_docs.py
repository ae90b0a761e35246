"""Pages quote the code as it is, and link to files that are there."""

import re
from pathlib import Path

import pytest

from docs.quote import pages, requoted

ROOT = Path(__file__).parents[1]
PAGES = [*pages(), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_quotes_are_current_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert requoted(text) == text, "run `make docs`"
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
