"""The page as Chromium shows it: drawn, silent, without the network, and answering to mouse and keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, Page, find_chromium
from tests.compare.sample import HOSTILE, full
from torchtitan_lite.compare.page import html
from torchtitan_lite.strict_json import strict_dumps

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")

STEPS = 120
_POINTS = """[...document.querySelectorAll('[data-metric={metric}] path.{kind}')].map(
    p => p.getAttribute('d').split(/[ML]/).length - 1)"""
_TICKS = "[...document.querySelectorAll('[data-metric=loss] .x-tick')].map(t => t.textContent)"
_TIP = "(t => t.hidden ? null : t.innerText)(document.querySelector('[data-metric={metric}] .tip'))"
_WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg')
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return full(tmp_path_factory.mktemp("full"), steps=STEPS)


@pytest.fixture
def url(record: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "report.html").write_text(html(record), encoding="utf-8")
    return (tmp_path / "report.html").as_uri()


def _box(page: Page, metric: str = "loss") -> tuple[float, float, float, float]:
    """x, y, width, height of a chart in the window, which is moved to it."""
    found = f"document.querySelector('[data-metric={metric}] .plot')"
    page.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
    x, y, width, height = page.evaluate(f"(r => [r.x, r.y, r.width, r.height])({found}.getBoundingClientRect())")
    return x, y, width, height


def _silent(page: Page, url: str) -> None:
    page.browser.listen(0.1)
    assert page.errors == []
    assert page.requests == [url]


def test_curves_are_drawn_without_errors_or_the_network(browser: Browser, url: str) -> None:
    page = browser.page(url)
    for metric, sides in (("loss", 3), ("loss_gap", 2), ("grad_norm", 3), ("step_time_s", 3), ("memory_peak_gib", 3)):
        points = page.evaluate(_POINTS.format(metric=metric, kind="middle"))
        assert [count for count in points if count] == [STEPS] * sides
    assert page.evaluate(_POINTS.format(metric="loss", kind="repeat")) == [STEPS] * 8 + [STEPS // 2]
    for size in page.evaluate(
        "[...document.querySelectorAll('[data-metric=loss] path.middle')].map(p => p.getBBox().height)"
    ):
        assert size > 100
    assert "first" not in page.evaluate("document.querySelector('[data-metric=step_time_s] .clipped').textContent")
    assert "9 values outside" in page.evaluate(
        "document.querySelector('[data-metric=step_time_s] .clipped').textContent"
    )
    ends = page.evaluate("[...document.querySelectorAll('[data-metric=loss] .end')].map(e => e.textContent).sort()")
    assert ends == ["A", "B", "C"]
    _silent(page, url)


def test_pointing_shows_the_values_of_all_sides(browser: Browser, url: str, record: dict[str, Any]) -> None:
    page = browser.page(url)
    x, y, width, height = _box(page, "memory_peak_gib")
    assert page.evaluate(_TIP.format(metric="memory_peak_gib")) is None
    page.mouse("mouseMoved", x + 0.6 * width, y + height / 2)
    lines = page.evaluate(_TIP.format(metric="memory_peak_gib")).split("\n")
    assert lines[0].startswith("step ")
    assert 40 < int(lines[0].split()[1]) < 80
    told = " ".join(lines)
    for side, memory in zip(record["sides"], ("0.6 GiB", "0.38 GiB", "0.6 GiB"), strict=True):
        assert side["label"] in told
        assert memory in told
    assert page.evaluate("document.querySelectorAll('.cross').length") == 5
    assert page.evaluate("document.querySelectorAll('[data-metric=loss] .spot').length") == 3
    page.mouse("mouseMoved", x + 0.6 * width, y - 60)
    assert page.evaluate(_TIP.format(metric="memory_peak_gib")) is None
    _silent(page, url)


def test_dragging_zooms_and_two_clicks_show_all(browser: Browser, url: str) -> None:
    page = browser.page(url)
    x, y, width, height = _box(page)
    whole = page.evaluate(_TICKS)
    page.drag(x + 0.5 * width, y + 50, x + 0.7 * width, y + 60)
    near = [float(tick) for tick in page.evaluate(_TICKS)]
    assert 50 <= near[0] < near[-1] <= 90
    points = page.evaluate("[...document.querySelectorAll('[data-metric=grad_norm] .x-tick')].map(t => +t.textContent)")
    assert points == near, "all charts zoom"
    assert page.evaluate("document.querySelector('.reset').disabled") is False
    page.click(x + 0.5 * width, y + 50, times=2)
    assert page.evaluate(_TICKS) == whole
    page.drag(x + 0.7 * width, y + 50, x + 0.5 * width, y + 50)
    assert page.evaluate(_TICKS) != whole
    page.evaluate("document.querySelector('.reset').click()")
    assert page.evaluate(_TICKS) == whole
    page.drag(x + 0.5 * width, y + height / 2, x + 0.5 * width + 3, y + height / 2)
    assert page.evaluate(_TICKS) == whole, "a click is no drag"
    _silent(page, url)


def test_the_axis_and_the_sides_shown_are_chosen(browser: Browser, url: str) -> None:
    page = browser.page(url)
    path = "document.querySelector('[data-metric=loss] path.middle[data-side=B]').getAttribute('d')"
    steps, along_steps = page.evaluate(_TICKS), page.evaluate(path)
    page.evaluate("document.querySelector('input[value=tokens]').click()")
    assert [tick for tick in page.evaluate(_TICKS) if tick.endswith(" k")]
    page.evaluate("document.querySelector('input[value=seconds]').click()")
    assert all(tick.endswith(" s") or tick.endswith(" min") for tick in page.evaluate(_TICKS))
    assert page.evaluate(path) != along_steps
    page.evaluate("document.querySelector('input[value=step]').click()")
    assert page.evaluate(_TICKS) == steps
    page.evaluate("document.querySelector('input[name=smooth]').click()")
    assert page.evaluate(_POINTS.format(metric="loss", kind="middle")) == [STEPS] * 3
    assert page.evaluate(_POINTS.format(metric="loss", kind="repeat")) == [STEPS] * 3
    heights = "[...document.querySelectorAll('[data-metric=step_time_s] path.{kind}')].map(p => p.getBBox().height)"
    for near, far in zip(*(page.evaluate(heights.format(kind=kind)) for kind in ("middle", "repeat")), strict=True):
        assert near < far
    page.evaluate("document.querySelector('input[name=smooth]').click()")
    assert page.evaluate(path) == along_steps
    button = "document.querySelector('.legend button[data-side=B]')"
    x, y = page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({button}.getBoundingClientRect())")
    if y > 700:
        page.evaluate(f"{button}.scrollIntoView({{block: 'center'}})")
        x, y = page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({button}.getBoundingClientRect())")
    page.click(x, y)
    assert page.evaluate(f"{button}.getAttribute('aria-pressed')") == "false"
    shown = "[...new Set([...document.querySelectorAll('.plot path.line[data-side]')].map(p => p.dataset.side))]"
    assert page.evaluate(shown) == ["A", "C"]
    for side in "AC":
        page.evaluate(f"document.querySelector('.legend button[data-side={side}]').click()")
    assert page.evaluate(shown) == []
    box = _box(page)
    page.mouse("mouseMoved", box[0] + 100, box[1] + 100)
    page.click(x, y)
    page.evaluate(f"{button}.click()")
    _silent(page, url)


def test_the_keyboard_does_what_the_mouse_does(browser: Browser, url: str) -> None:
    page = browser.page(url)
    whole = page.evaluate(_TICKS)
    page.evaluate("document.querySelector('[data-metric=loss] .plot').focus()")
    page.key("ArrowRight")
    first = page.evaluate(_TIP.format(metric="loss"))
    page.key("ArrowRight")
    second = page.evaluate(_TIP.format(metric="loss"))
    assert int(second.split()[1]) == int(first.split()[1]) + 1
    page.key("+")
    assert page.evaluate(_TICKS) != whole
    page.key("0")
    assert page.evaluate(_TICKS) == whole
    page.key("ArrowLeft")
    page.key("Escape")
    assert page.evaluate(_TIP.format(metric="loss")) is None
    reached = "document.querySelectorAll('button, input, summary, [tabindex=\"0\"]').length"
    assert page.evaluate(reached) > 15
    _silent(page, url)


def test_no_width_is_too_narrow(browser: Browser, url: str) -> None:
    page = browser.page(url, 1400)
    for width in (1400, 700, 400):
        page.resize(width)
        page.wait(f"Math.round(document.querySelector('.plot svg').viewBox.baseVal.width) <= {width}")
        assert page.evaluate(_WIDER) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.prefer(dark=True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    _silent(page, url)


def test_what_is_missing_or_hostile_breaks_nothing(browser: Browser, record: dict[str, Any], tmp_path: Path) -> None:
    own = json.loads(strict_dumps(record))
    for side in own["sides"]:
        side["label"] = HOSTILE
    own["machine"]["host"] = own["pairs"][0]["words"] = HOSTILE + "x" * 300
    losses = own["sides"][0]["runs"][0]["curve"]["loss"]
    losses[10], losses[-1] = "nan", "inf"
    own["sides"][1]["runs"] = [
        {**own["sides"][1]["runs"][0], "curve": {k: v[:1] for k, v in own["sides"][1]["runs"][0]["curve"].items()}}
    ]
    own["sides"][2]["runs"] = [{"folder": "f", "seed": None, "state": "failed", "told": HOSTILE, "curve": {}}]
    path = tmp_path / "report.html"
    path.write_text(html(own), encoding="utf-8")
    page = browser.page(path.as_uri(), 400)
    assert page.evaluate("typeof alerted") == "undefined"
    assert page.evaluate("document.querySelectorAll('b[onmouseover]').length") == 0
    assert page.evaluate(_POINTS.format(metric="loss", kind="middle")) == [STEPS, 1]
    box = _box(page)
    page.mouse("mouseMoved", box[0] + 0.5 * box[2], box[1] + 60)
    assert HOSTILE[:10] in page.evaluate("document.querySelector('[data-metric=loss] .tip').textContent")
    assert page.evaluate(_WIDER) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    _silent(page, path.as_uri())


def test_a_script_that_got_in_would_not_run(browser: Browser, record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html(record).replace("</main>", "<script>document.title = 'taken'</script></main>"))
    page = browser.page(path.as_uri())
    assert page.evaluate("document.title") == "3 recipes compared"
    browser.listen(0.1)
    assert [error for error in page.errors if "Content Security Policy" in error]
