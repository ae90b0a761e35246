"""The page as text: nothing lost, nothing from outside, nothing that a label could smuggle in."""

import json
import math
import random
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.compare.folders import write_run
from tests.compare.sample import HOSTILE, folders, full, told
from torchtitan_lite.compare.curves import METRICS, POINTS, broken, chart_data, middle_of, smoothed, thinned
from torchtitan_lite.compare.markup import Html, data, duration, number, scaled, tag
from torchtitan_lite.compare.page import html
from torchtitan_lite.strict_json import strict_dumps

SECTIONS = ["verdicts", "assertions", "unfit", "charts", "speed", "sides", "breakdown", "pairs", "equal", "target"]
SECTIONS += ["config", "derived", "sources", "folders"]


class Read(HTMLParser):
    """tags: (name, attributes). text: what a reader sees, of script and style nothing. data: of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "input"):
            assert self.open.pop() == tag, f"</{tag}> ends something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def sections(self) -> list[str | None]:
        return [attributes["id"] for name, attributes in self.tags if name == "section"]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return full(tmp_path_factory.mktemp("full"))


@pytest.fixture
def own(document: dict[str, Any]) -> dict[str, Any]:
    """One to change."""
    return dict(json.loads(strict_dumps(document)))


def test_everything_is_there(document: dict[str, Any]) -> None:
    read = Read(html(document))
    assert read.sections() == SECTIONS
    for said in (
        "3 recipes compared",
        document["pairs"][0]["words"],
        "loss: equal",
        f"speed: slower, {document['pairs'][0]['speed']['ratio']:.3f} x",
        "memory: 0.633 x",
        "memory: alike",
        "What it took to reach a loss of 4.5",
        "[activation_checkpoint]",
        "cut short at step 40 of 80",
        "3 does not divide 8 heads",
        "no such run",
        "0.123 GiB",
        "idle",
        "train_configs/baseline.toml extends train_configs/llama3_debug.toml",
        "B.memory < 0.1",
    ):
        assert said in read.text, said
    settings = read.text.partition("Settings that differ")[2].split()
    assert settings[:4] == ["setting", "A", "B", "C"]
    assert settings[4:13] == [
        *("[activation_checkpoint]", "mode", "none", "full", "none"),
        *("[optimizer]", "lr", "0.003", "0.003"),
    ]
    assert settings[13] == "0.006"
    for side in document["sides"]:
        assert f"{side['summary']['tps']:,.0f}" in read.text
        assert f"{side['summary']['validation_loss']:.4f}" in read.text
        for run in side["runs"]:
            assert run["folder"] in read.text
    assert "0.25 to 0.75 GiB" in read.text
    charts = [attributes["data-metric"] for name, attributes in read.tags if attributes.get("class") == "chart"]
    assert charts == ["loss", "loss_gap", "grad_norm", "step_time_s", "memory_peak_gib"]


def test_what_is_not_there_takes_no_place(tmp_path: Path) -> None:
    read = Read(html(told(folders(tmp_path, 2, 1), [], None)))
    assert read.sections() == [name for name in SECTIONS if name not in ("assertions", "unfit", "target")]
    assert "full-recompute against baseline" in read.text


def test_keys_of_sections_within_sections_are_shown(tmp_path: Path) -> None:
    key, converters = "quantize.linear.float8.emulate", 'model.converters=["quantize.linear.float8"]'
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", f"--{converters}", f"--{key}=true")
    settings = Read(html(told([a, b], [], None))).text.partition("Settings that differ")[2].split()
    at = settings.index("[quantize.linear.float8]")
    assert settings[at + 1 : at + 4] == ["emulate", "false", "true"]


def test_the_page_of_the_file_is_the_page_of_the_record(document: dict[str, Any], own: dict[str, Any]) -> None:
    assert html(own) == html(document)


def test_nothing_comes_from_outside(document: dict[str, Any]) -> None:
    page = html(document)
    for name, attributes in Read(page).tags:
        assert name not in ("link", "img", "iframe", "base", "object", "a")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), name
    assert not re.search(r"https?:|url\((?!#)|@import|import\(|fetch\(|XMLHttp|sendBeacon|WebSocket", page)


def _strings(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the document has strings of users: all but names of sides, states, verdicts and what machines write."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in ("name", "a", "b", "verdict", "along", "state", "curve", "kind", "interval"):
                yield from _strings(entry, (*place, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _strings(entry, (*place, index))
    elif isinstance(value, str):
        yield place


def test_users_words_are_words(own: dict[str, Any]) -> None:
    benign = Read(html(own))
    places = list(_strings(own))
    assert len(places) > 60
    for *path, last in places:
        inner = own
        for key in path:
            inner = inner[key]
        inner[last] = HOSTILE
    own["pairs"][0]["config_diff"][HOSTILE] = {HOSTILE: [HOSTILE, {HOSTILE: 1}]}
    own["pairs"][0]["derived_diff"][HOSTILE] = [HOSTILE, None]
    own["sides"][0]["summary"]["breakdown"] = {HOSTILE: 1.0}
    read = Read(html(own))
    assert read.text.count(HOSTILE) > 40
    assert [name for name, _ in read.tags].count("script") == [name for name, _ in benign.tags].count("script") == 2
    assert {name for name, _ in read.tags} == {name for name, _ in benign.tags}
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    assert json.loads(read.scripts[0])[0]["label"] == HOSTILE
    assert read.scripts[1] == benign.scripts[1]


def test_names_that_are_no_utf8_can_be_written(own: dict[str, Any], tmp_path: Path) -> None:
    own["sides"][0]["source"] = own["sides"][0]["label"] = b"caf\xe9".decode("utf-8", "surrogateescape")
    (tmp_path / "page.html").write_text(html(own), encoding="utf-8")
    assert "caf?" in (tmp_path / "page.html").read_text(encoding="utf-8")


def _holes(value: Any) -> Any:
    """With None for every number that may be missing."""
    return {key: None if not isinstance(entry, dict) else _holes(entry) for key, entry in value.items()}


def test_what_is_not_known_is_said(own: dict[str, Any]) -> None:
    side, pair = own["sides"][1], own["pairs"][0]
    side["summary"] = _holes(side["summary"]) | {"target": {**_holes(side["summary"]["target"]), "reached": 0}}
    own["sides"][2] |= {"summary": {}, "runs": [], "device": None}
    own["machine"] = {"host": "h", "device": None, "cores": 2, "torch": None}
    pair["loss"] |= {"gap": None, "interval": None, "envelope": None, "at_equal": {}}
    pair["speed"] |= {"verdict": "not comparable", "ratio": None, "interval": None, "pairs": []}
    pair["memory"]["ratio"] = None
    pair["target"] = {"step": None, "tokens": None, "seconds": None}
    own["pairs"][1]["speed"]["interval"] = [0.0, math.inf]
    read = Read(html(own))
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|\bnull\b", read.text)
    for said in ("speed: not comparable", "memory: n/a", "0 of 3 runs"):
        assert said in read.text
    cells = re.search(r"full-recompute \s*2 \s*3 (.*?) C", read.text.partition("Numbers")[2], re.DOTALL)
    assert cells is not None
    assert cells[1].split() == ["n/a"] * 14


def test_nothing_to_compare_is_a_page_too(own: dict[str, Any]) -> None:
    own |= {"pairs": [], "assertions": [], "words": "Nothing could be compared."}
    for side in own["sides"]:
        side |= {"summary": {}, "runs": []}
    read = Read(html(own))
    assert "Nothing could be compared." in read.text
    assert read.sections() == ["verdicts", "unfit", "sides", "sources", "folders"]


@pytest.mark.parametrize("count", [2, POINTS, POINTS + 1, 60_000])
def test_thin_curves_keep_what_stands_out(count: int) -> None:
    draw = random.Random(count)
    # Neither end stands out.
    curve: dict[str, list[float | None]] = {name: [draw.random() for _ in range(count)] for name in METRICS}
    for name in METRICS:
        curve[name][0] = curve[name][-1] = 0.5
    curve |= {"step": list(range(count)), "tokens": list(range(count)), "seconds": list(range(count))}
    spikes = {name: draw.randrange(count) for name in METRICS}
    for name, place in spikes.items():
        curve[name][place] = 100.0
        curve[name][(place + count // 2) % count] = -100.0
    curve["loss_gap"] = [None] * count
    thin = thinned(curve)
    assert len(thin["step"]) <= POINTS
    assert thin["step"] == sorted(set(thin["step"]), key=lambda step: step or 0)
    assert (thin["step"][0], thin["step"][-1]) == (0, count - 1)
    for name in METRICS[:-1]:
        assert (max(thin[name]), min(thin[name])) == (100.0, -100.0), name
        assert thin["step"][thin[name].index(100.0)] == spikes[name]
    if count <= POINTS:
        assert len(thin["step"]) == count
    else:
        assert len(thin["step"]) > POINTS / 2


def test_smooth_curves_follow_and_forget_spikes() -> None:
    count = 3000
    curve: dict[str, list[float | None]] = {name: [float(index) for index in range(count)] for name in METRICS}
    curve |= {name: [float(index) for index in range(count)] for name in ("step", "tokens", "seconds")}
    curve["loss"][500] = 1e6
    curve["loss"][1000] = None
    curve["grad_norm"][:500] = [None] * 500
    smooth = smoothed(curve)
    assert len(smooth["step"]) == 500
    assert (smooth["step"][0], smooth["step"][-1]) == (0, count - 1)
    assert smooth["step"][:490] == smooth["step_time_s"][:490], "a straight line stays where it is"
    assert max(abs(y - x) for x, y in zip(smooth["step"][:490], smooth["loss"][:490], strict=True)) <= 1
    assert count - 60 < smooth["loss"][-1] < count - 20, "the end looks back"
    assert smooth["grad_norm"][0] is None
    assert smoothed({name: values[:3] for name, values in curve.items()})["loss"] == [0, 1, 2]


def _run(steps: list[int], loss: list[Any], **told: Any) -> dict[str, Any]:
    curve = {"step": steps, "tokens": [10.0 * step for step in steps], "loss": loss}
    curve |= {name: [0.5] * len(steps) for name in ("grad_norm", "step_time_s", "memory_peak_gib")}
    return {"curve": curve, "seed": 42, **told}


def _document(*sides: list[dict[str, Any]], along: str = "steps") -> dict[str, Any]:
    told = [{"name": "ABC"[index], "label": "", "runs": runs} for index, runs in enumerate(sides)]
    pairs = [{"a": "A", "b": side["name"], "comparable": {"data": True}, "along": along} for side in told[1:]]
    return {"sides": told, "pairs": pairs}


def test_the_middle_of_repeats_and_the_time_they_took() -> None:
    runs = [_run([2, 4, 6], [3.0, 2.0, 1.0]), _run([2, 4], [5.0, 6.0]), _run([2], ["nan"])]
    side = chart_data(_document(runs))[0]
    assert side["middle"]["step"] == [2, 4]
    assert side["middle"]["loss"] == [4, 4]
    assert side["middle"]["seconds"] == [1, 2]
    assert side["repeats"][0]["seconds"] == [1, 2, 3]
    assert side["repeats"][2]["loss"] == [None]
    alone = chart_data(_document([_run([1], [math.inf]), {"curve": {}, "seed": None}]))[0]
    assert (alone["repeats"], alone["middle"]["loss"]) == ([], [None])
    assert middle_of([side["repeats"][0]])["loss"] == [3, 2, 1]


def test_losses_above_the_first_side_are_of_one_seed_and_one_step() -> None:
    a = [_run([1, 2, 3], [5.0, 4.0, 3.0]), _run([1, 2, 3], [9.0, 9.0, 9.0], seed=43)]
    b = [_run([2, 3, 4], [4.5, "nan", 1.0]), _run([1, 2, 3], [1.0, 1.0, 1.0], seed=44)]
    first, second = chart_data(_document(a, b))
    assert first["middle"]["loss_gap"] == [None] * 3
    assert second["repeats"][0]["loss_gap"] == [0.5, None, None]
    assert second["repeats"][1]["loss_gap"] == [None] * 3
    assert chart_data(_document(a, b, along="tokens"))[1]["repeats"][0]["loss_gap"] == [None] * 3


def test_what_is_not_finite_is_told() -> None:
    sides = _document([_run([1, 2, 3], [1.0, math.nan, "inf"])])["sides"]
    assert broken(sides, "loss") == ["A, seed 42: not finite at 2 of 3 logged steps, first at step 2"]
    assert broken(sides, "grad_norm") == []


def test_markup_escapes_unless_told() -> None:
    assert tag("p", "a<b", Html("<i>"), class_="x", data_n='"', hidden=True, id=None) == (
        '<p class="x" data-n="&quot;" hidden>a&lt;b<i></p>'
    )
    written = data("d", {"x": "</script>&\u2028", "y": math.nan})
    assert written.count("<") == 2
    assert json.loads(Read(written).scripts[0]) == {"x": "</script>&\u2028", "y": "nan"}


def test_numbers_are_for_readers() -> None:
    assert [number(value, ".2f", " GiB") for value in (None, 1.234, "nan", math.inf)] == [
        "n/a",
        "1.23 GiB",
        "not finite",
        "not finite",
    ]
    assert [scaled(value) for value in (None, 0, 999.9, 999.99, 1234567, 5e12)] == [
        "n/a",
        "0",
        "999.9",
        "1 k",
        "1.235 M",
        "5 T",
    ]
    assert scaled(5e12, "FLOP") == "5 TFLOP"
    assert [duration(value) for value in (None, 0.1234, 2.0, 90.0, 150.0, 9000.0)] == [
        "n/a",
        "123.4 ms",
        "2 s",
        "90 s",
        "2.5 min",
        "2.5 h",
    ]


def test_the_wheel_has_what_the_page_takes_in() -> None:
    """Wheels have all of the package that git does not ignore."""
    root = Path(__file__).parents[2]
    assets = files("torchtitan_lite.compare").joinpath("page_assets")
    for name in ("report.js", "report.css"):
        assert assets.joinpath(name).is_file()
        ignored = subprocess.run(["git", "check-ignore", "-q", str(assets.joinpath(name))], cwd=root)
        assert ignored.returncode != 0
