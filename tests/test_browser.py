"""The browser that looks at pages in other tests sees what it should."""

from pathlib import Path

import pytest

from tests.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")


def test_a_page_is_seen_heard_and_used(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        """<!doctype html><body style="margin: 0; height: 2000px"><img src="none.png">
        <button style="width: 100px; height: 40px" onclick="used()">x</button>
        <script>
        function used() { document.title = "clicked"; console.error("heard"); }
        document.body.onmousemove = event => window.last = event.clientX;
        setTimeout(() => later(), 0);
        </script>"""
    )
    url = (tmp_path / "page.html").as_uri()
    with Browser() as browser:
        page = browser.page(url, 500, 300)
        assert page.evaluate("[innerWidth, innerHeight]") == [500, 300]
        assert page.evaluate("Promise.resolve({a: 1})") == {"a": 1}
        assert page.requests == [url, (tmp_path / "none.png").as_uri()]
        page.click(30, 30)
        page.wait("document.title == 'clicked'", 5)
        page.drag(10, 100, 110, 100)
        assert page.evaluate("last") == 110
        browser.listen(0.2)
        assert [any(part in error for error in page.errors) for part in ("none.png", "later is not", "heard")] == [
            True
        ] * 3
        assert not page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        page.prefer(dark=True)
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        page.screenshot(tmp_path / "out.png")
        assert int.from_bytes((tmp_path / "out.png").read_bytes()[20:24], "big") == 2000
        with pytest.raises(RuntimeError, match="is not defined"):
            page.evaluate("nothing()")
        with pytest.raises(TimeoutError):
            page.wait("false", 0.1)
    assert browser._process.poll() is not None
