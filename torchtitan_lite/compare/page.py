"""report.html: a comparison as one page that needs nothing but itself. No torch."""

import base64
import math
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from torchtitan_lite.compare import page_tables as tables
from torchtitan_lite.compare.curves import LOGGED, METRICS, broken, chart_data
from torchtitan_lite.compare.markup import Html, data, finite, joined, number, tag

Document = Mapping[str, Any]

_CHARTS = (
    ("loss", "Loss", ""),
    ("loss_gap", "Loss above that of {first}", ""),
    ("grad_norm", "Gradient norm", ""),
    ("step_time_s", "Time of a step", "s"),
    ("memory_peak_gib", "Peak memory of a rank", "GiB"),
)
_AXES = (("step", "steps"), ("tokens", "tokens"), ("seconds", "time"))
# By verdict: whether it is welcome, and a sign that says it without colour.
_LOSS = {"equal": ("good", "="), "different": ("bad", "≠"), "no difference shown": ("even", "≈")}
_SPEED = {"faster": ("good", "▲"), "slower": ("bad", "▼"), "no difference shown": ("even", "≈")}
_NONE = ("even", "–")
_PARAGRAPHS = 4  # more of them are folded
_ALIKE = 0.005  # ratios of memory so close are called the same
_APART = 9.0  # percent of the scale between its numbers, at least
_TICKS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def html(document: Document) -> str:
    """document: as compare.document.document makes it. Everything in it that is not ours is escaped."""
    script, style = _asset("report.js"), _asset("report.css")
    title, curves = _title(document), chart_data(document)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", _facts(document), class_="facts")),
        tag("main", *_sections(document, curves)),
        data("curves", curves),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(document: Document, curves: Sequence[Mapping[str, Any]]) -> list[Html]:
    following = tables.derived_difference(document)
    parts: list[tuple[str, str, Html | None]] = [
        ("verdicts", "Verdicts", _verdicts(document)),
        ("assertions", "Conditions", tables.assertions(document)),
        ("unfit", "What could not run to its end", tables.unfit(document)),
        ("charts", "Curves", _charts(document, curves)),
        ("speed", "Speed", _ratios(document)),
        ("sides", "Numbers", tables.sides(document)),
        ("breakdown", "What a step is spent on", tables.breakdown(document)),
        ("pairs", "Pairs", tables.pairs(document) if document["pairs"] else None),
        ("equal", "Losses where both have spent as much", tables.at_equal(document)),
        ("target", _target_title(document), tables.target(document)),
        ("config", "Settings that differ", tables.config_difference(document)),
        ("derived", "What follows from them", following and tag("details", tag("summary", "show"), following)),
        ("sources", "Where sides come from", tables.sources(document)),
        ("folders", "Runs", tables.folders(document)),
    ]
    return [
        tag("section", tag("h2", title, id=f"{name}-title"), inner, id=name, aria_labelledby=f"{name}-title")
        for name, title, inner in parts
        if inner is not None
    ]


def _title(document: Document) -> str:
    labels = [str(side["label"]) for side in document["sides"]]
    if len(labels) == 2:
        return f"{labels[1]} against {labels[0]}"
    return f"{len(labels)} recipes compared"


def _facts(document: Document) -> Html:
    machine = document["machine"]
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(document["created"]))
    steps, repeats = document.get("steps"), document.get("repeats")
    told = [
        created,
        machine["host"],
        machine["device"],
        f"{machine['cores']} cores",
        machine["torch"] and f"torch {machine['torch']}",
        steps and f"{steps:,} steps",
        repeats and f"{repeats} repeat{'s' if repeats != 1 else ''}",
    ]
    return joined([part for part in told if part], " · ")


def _verdicts(document: Document) -> Html:
    if not document["pairs"]:
        return tag("p", document["words"])
    labels = {side["name"]: side["label"] for side in document["sides"]}

    def one(pair: Mapping[str, Any]) -> Html:
        names = [joined([tables.side_name(document, pair[each]), " ", labels[pair[each]]]) for each in ("b", "a")]
        heading = tag("h3", names[0], tag("span", " against ", class_="soft"), names[1])
        badges = tag("p", _loss_badge(pair["loss"]), _speed_badge(pair["speed"]), _memory_badge(pair["memory"]))
        words = tag("p", pair["words"])
        if len(document["pairs"]) > _PARAGRAPHS:
            words = tag("details", tag("summary", "in words"), words)
        return tag("article", heading, badges, words, class_="pair")

    return tag("div", *map(one, document["pairs"]))


def _loss_badge(loss: Mapping[str, Any]) -> Html:
    kind, sign = _LOSS.get(loss["verdict"], _NONE)
    said, gap = loss["verdict"], finite(loss["gap"])
    if said == "different" and gap and loss["envelope"] is None:
        kind, sign, said = ("bad", "▲", "higher by ") if gap > 0 else ("good", "▼", "lower by ")
        said += f"{abs(gap):.3g}"
    return _badge(kind, sign, f"loss: {said}")


def _speed_badge(speed: Mapping[str, Any]) -> Html:
    size = f", {number(speed['ratio'], '.3f')} x" if speed["verdict"] in ("faster", "slower") else ""
    return _badge(*_SPEED.get(speed["verdict"], _NONE), f"speed: {speed['verdict']}{size}")


def _memory_badge(memory: Mapping[str, Any]) -> Html:
    ratio = finite(memory["ratio"])
    if ratio is None:
        return _badge(*_NONE, "memory: n/a")
    if abs(ratio - 1) < _ALIKE:
        return _badge("even", "≈", "memory: alike")
    return _badge(*(("good", "▼") if ratio < 1 else ("bad", "▲")), f"memory: {ratio:.3g} x")


def _badge(kind: str, sign: str, said: str) -> Html:
    return tag("span", tag("span", sign, class_="sign", aria_hidden="true"), " ", said, class_=f"badge {kind}")


def _charts(document: Document, curves: Sequence[Mapping[str, Any]]) -> Html | None:
    """curves: as chart_data has them; None where there are none. The script draws into the boxes."""
    if not curves:
        return None
    axes = [
        tag("label", tag("input", type="radio", name="axis", value=value, checked=value == "step"), f" {said}")
        for value, said in _AXES
    ]
    legend = [
        tag("button", tables.swatch(side["index"]), tag("b", side["name"]), tag("span", side["label"], class_="label"),
            type="button", aria_pressed="true", title=side["label"], data_side=side["name"])
        for side in curves
    ]  # fmt: skip
    controls = tag(
        "div",
        tag("div", *legend, class_="legend", role="group", aria_label="sides shown"),
        tag("fieldset", tag("legend", "along"), *axes),
        tag("label", tag("input", type="checkbox", name="smooth"), " smooth"),
        tag("button", "whole range", type="button", class_="reset", disabled=True),
        class_="controls",
    )
    drawn = {name for side in curves for name in METRICS if any(y is not None for y in side["middle"][name])}
    figures = [
        _figure(document, metric, title.format(first=curves[0]["name"]), unit)
        for metric, title, unit in _CHARTS
        if metric in drawn or metric in LOGGED
    ]
    usage = (
        "Drag to zoom, double-click for the whole range. With the keyboard: arrows move along a chart, + and - zoom, "
        "0 shows all. Bold lines are the median of repeats, thin ones the repeats. "
        "Smooth lines are running medians over a 25th of a run, and thin ones then the median of repeats."
    )
    noscript = tag("noscript", tag("p", "Curves need JavaScript; the tables do not."))
    return joined([controls, noscript, tag("div", *figures, tag("p", usage, class_="soft"), class_="charts")])


def _figure(document: Document, metric: str, title: str, unit: str) -> Html:
    notes = [tag("p", told, class_="note") for told in (broken(document["sides"], metric) if metric in LOGGED else ())]
    plot = tag("div", class_="plot", tabindex="0", role="group", aria_label=f"{title}, chart")
    caption = tag("figcaption", title, tag("span", f" {unit}", class_="soft"), tag("span", class_="clipped"))
    return tag("figure", caption, plot, *notes, class_="chart", data_metric=metric, data_unit=unit)


def _ratios(document: Document) -> Html | None:
    """Speed ratios with their intervals on a logarithmic scale."""
    known = [pair for pair in document["pairs"] if finite(pair["speed"]["ratio"])]
    if not known:
        return None
    low, high, place = _scale(known)
    marks: list[float] = []
    for tick in sorted(
        (tick for tick in _TICKS if low <= tick <= high), key=lambda tick: (tick != 1.0, len(f"{tick:g}"))
    ):
        if all(abs(place(tick) - place(other)) >= _APART for other in marks):
            marks.append(tick)
    rows = [_ratio_row(document, pair, place) for pair in known]
    ticks = [tag("span", f"{tick:g}", class_="tick", style=f"left:{place(tick):.2f}%") for tick in marks]
    axis = tag("div", tag("span"), tag("div", *ticks, class_="track axis"), tag("span"), class_="ratio")
    told = "Tokens per second over those of the side it is held against, with 99% intervals; small marks are repeats."
    return joined([tag("p", told, class_="soft"), tag("div", *rows, axis, class_="ratios")])


def _scale(pairs: Sequence[Mapping[str, Any]]) -> tuple[float, float, Callable[[float], float]]:
    """From the lowest to the highest that is shown, and a ratio's place in percent."""
    shown = [1.0]
    for pair in pairs:
        values = [pair["speed"]["ratio"], *(pair["speed"]["interval"] or ()), *pair["speed"]["pairs"]]
        shown += [min(max(value, 0.05), 20.0) for each in values if (value := finite(each))]
    low, high = min(*shown, 0.95) / 1.03, max(*shown, 1.05) * 1.03

    def place(ratio: float) -> float:
        return 100 * math.log(min(max(ratio, low), high) / low) / math.log(high / low)

    return low, high, place


def _ratio_row(document: Document, pair: Mapping[str, Any], place: Callable[[float], float]) -> Html:
    speed = pair["speed"]
    bounds = [finite(each) for each in speed["interval"] or ()]
    left, right = (place(each or default) for each, default in zip(bounds, (1e-9, 1e9), strict=True))
    repeats = [tag("span", class_="repeat", style=f"left:{place(each):.2f}%") for each in speed["pairs"]]
    track = tag(
        "div",
        tag("span", class_="one", style=f"left:{place(1.0):.2f}%"),
        tag("span", class_="interval", style=f"left:{left:.2f}%;width:{right - left:.2f}%"),
        *repeats,
        tag("span", class_="dot", style=f"left:{place(speed['ratio']):.2f}%"),
        class_="track",
    )
    name = joined([tables.side_name(document, pair["b"]), f" against {pair['a']}"])
    kind = _SPEED.get(speed["verdict"], _NONE)[0]
    interval = " to ".join(number(each, ".3f") for each in speed["interval"] or ())
    said = f"{number(speed['ratio'], '.3f')} ({interval}), {speed['verdict']}"
    return tag("div", tag("span", name), track, tag("span", said), class_=f"ratio {kind}")


def _target_title(document: Document) -> str:
    target = document.get("target_loss")
    return f"What it took to reach a loss of {target:g}" if target is not None else ""


def _policy(script: str) -> str:
    """Nothing from elsewhere, and no script but the one that belongs to the page."""
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("torchtitan_lite.compare").joinpath("page_assets", name).read_text(encoding="utf-8")
