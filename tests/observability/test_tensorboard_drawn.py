"""TensorBoard as Chromium shows it: each of its pages drawn from a run's events, silent, and answering to the mouse."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.browser import Browser, Page, find_chromium
from tests.observability.boards import Served, served
from torchtitan_lite.observability.histograms import Counted
from torchtitan_lite.observability.tensorboard import About, Setting, TensorBoard

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")

STEPS = 20
RUNS = {"first": 0.5, "second": 0.25}  # to the learning rate
_BUCKETS = 1028

# Much of TensorBoard is in shadow roots, which selectors do not enter.
_DEEP = """(() => {
    const found = [];
    const walk = root => {
        found.push(...root.querySelectorAll(SELECTOR));
        for (const each of root.querySelectorAll('*')) if (each.shadowRoot) walk(each.shadowRoot);
    };
    walk(document);
    return found;
})()"""
# Pixels of each colour that nothing shines through, in a canvas or picture.
_COUNTED = """(shown => {
    const [width, height] = [shown.naturalWidth || shown.width, shown.naturalHeight || shown.height];
    const copy = Object.assign(document.createElement('canvas'), {width, height});
    const context = copy.getContext('2d');
    context.drawImage(shown, 0, 0);
    const pixels = context.getImageData(0, 0, width, height).data;
    const counts = {};
    for (let at = 0; at < pixels.length; at += 4) {
        const colour = pixels.slice(at, at + 3).join();
        if (pixels[at + 3] === 255) counts[colour] = (counts[colour] || 0) + 1;
    }
    return counts;
})"""
_CHART = "document.querySelector('scalar-card line-chart canvas')"
_TIP = "(t => t ? t.innerText : '')(document.querySelector('.cdk-overlay-container .tooltip'))"


def _loss(name: str, step: int) -> float:
    return 8.0 - RUNS[name] * step**0.5


def _write(folder: Path, name: str) -> None:
    settings = (Setting("model", "model", "tiny"), Setting("optimizer.lr", "lr", RUNS[name]))
    text = f"Recipe `{name}.toml`\n\n```toml\n[optimizer]\nlr = {RUNS[name]}\n```\n"
    board = TensorBoard(folder, 1, About(settings, text, "cpu"))
    for step in range(1, STEPS + 1):
        board.metrics({"step": step, "loss": _loss(name, step), "tps": 1000.0})
    board.add_profile(10, {"compute_s": 0.75, "communication_exposed_s": 0.25})
    table = torch.zeros(2, 1, _BUCKETS, dtype=torch.float64)
    table[0, 0, 700:740] = torch.arange(40)
    for step in (10, 20):
        board.histograms(step, Counted(["layers.0.scale"], [sum(range(40))], table))
    board.close("finished")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    logdir = tmp_path_factory.mktemp("outputs")
    for name in RUNS:
        _write(logdir / name / "tb", name)
    with served(logdir, "true") as up:
        deadline = time.monotonic() + 30
        while len(up.get("runs")) < len(RUNS) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield up


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def silent(outputs: Served, browser: Browser) -> Iterator[Any]:
    """Opens a page of TensorBoard; at the end none of them has logged an error or asked another host."""
    pages: list[Page] = []

    def show(place: str) -> Page:
        pages.append(browser.page(f"{outputs.url}{place}", 1400, 900))
        return pages[-1]

    yield show
    browser.listen(0.2)
    for page in pages:
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith((outputs.url, "data:", "blob:"))] == []


def _deep(selector: str, then: str) -> str:
    return f"{_DEEP.replace('SELECTOR', repr(selector))}.{then}"


def _words(page: Page, selector: str, *wanted: str) -> str:
    """The text of those elements, once it has all that is wanted."""
    text = _deep(selector, "map(e => e.innerText).join('\\n')")
    page.wait(f"(t => {list(wanted)}.every(w => t.includes(w)))({text})")
    return str(page.evaluate(text))


def test_curves_of_all_runs_are_drawn_and_tell_their_values(silent: Any) -> None:
    page = silent("?tagFilter=global_avg_loss#timeseries")
    _words(page, "runs-data-table", "first/tb", "second/tb")
    # Of each run the smoothed curve and the pale one of its values; two more would be other runs.
    page.wait(f"{_CHART} && Object.values({_COUNTED}({_CHART})).filter(count => count > 100).length === 4")
    x, y, width, height = page.evaluate(f"(r => [r.x, r.y, r.width, r.height])({_CHART}.getBoundingClientRect())")
    assert page.evaluate(_TIP) == ""
    for part in (0.5, 0.51):
        page.mouse("mouseMoved", x + part * width, y + height / 2)
    tip = page.wait(f"{_TIP}.includes('second/tb') && {_TIP}")
    rows = {run: rest for run, *rest in (line.strip().split("\t") for line in tip.splitlines())}
    for name in RUNS:
        _, value, step, *_ = rows[f"{name}/tb"]
        assert 1 < int(step) < STEPS
        assert float(value) == pytest.approx(_loss(name, int(step)), rel=1e-3)


def test_the_table_of_recipes_is_filled(silent: Any) -> None:
    page = silent("#hparams")
    text = _words(page, "vaadin-grid-cell-content", "first/tb", "second/tb", "0.50000", "0.25000", "tps, median")
    assert f"{_loss('first', STEPS):.4f}" in text
    assert "1000.0" in text


def test_the_config_is_there_as_code(silent: Any) -> None:
    page = silent("#text")
    text = _words(page, "pre code", "lr = 0.5", "lr = 0.25")
    assert "[optimizer]" in text


def test_histograms_are_drawn_a_step_behind_the_other(silent: Any) -> None:
    page = silent("#histograms")
    page.wait(_deep(".histogram path", "filter(p => p.getAttribute('d')).length >= 4"))
    outlines = page.evaluate(_deep(".histogram", "map(g => (g.querySelector('path').getAttribute('d') || '').length)"))
    assert len(outlines) == 2 * len(RUNS)
    assert all(length > 100 for length in outlines)


def test_the_picture_of_a_profile_is_shown(silent: Any) -> None:
    page = silent("#images")
    page.wait(_deep("img", f"filter(i => i.complete && i.naturalWidth).length === {len(RUNS)}"))
    assert page.evaluate(_deep("img", "map(i => i.naturalWidth)")) == [640] * len(RUNS)
    for colours in page.evaluate(_deep("img", f"map({_COUNTED})")):
        assert colours == {"31,119,180": 480 * 48, "255,127,14": 160 * 48}
