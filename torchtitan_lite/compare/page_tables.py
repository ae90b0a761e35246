"""The tables of a comparison's page. No torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchtitan_lite.compare.markup import UNKNOWN, Html, duration, finite, joined, number, scaled, table, tag

Document = Mapping[str, Any]

_PARTS = ("compute", "communication", "copies", "idle")  # of a step; their colours, and others' after them


def swatch(index: int) -> Html:
    """The line by which charts draw the side of that index."""
    line = tag("path", class_=f"line {line_class(index)}", d="M1 5H27")
    return tag("svg", line, class_="swatch", viewBox="0 0 28 10", aria_hidden="true")


def line_class(index: int) -> str:
    """A colour and a dash, the same pair for no two of 32."""
    return f"c{index % 8} d{(index + index // 8) % 4}"


def side_name(document: Document, name: str) -> Html:
    index = [side["name"] for side in document["sides"]].index(name)
    return joined([swatch(index), " ", name])


def sides(document: Document) -> Html:
    head = ["", "recipe", "ranks", "runs", "loss", "step", "tokens/s", "memory", "by rank", "MFU", "validation loss"]
    head += ["step, 99%", "tokens/s a rank", "TFLOP/s a rank", "data wait", "sent a step", "first step", "compile"]
    rows = []
    for side in document["sides"]:
        of, runs = side["summary"], side["runs"]
        done = sum(run["state"] == "finished" for run in runs)
        rows.append(
            [
                side_name(document, side["name"]),
                side["label"],
                side["ranks"],
                done if done == len(runs) else f"{done} of {len(runs)}",
                number(of.get("loss"), ".4f"),
                duration(of.get("step_time_s")),
                number(of.get("tokens_per_s"), ",.0f"),
                number(of.get("memory_peak_gib"), ".2f", " GiB"),
                _ends(of.get("memory_by_rank")),
                number(of.get("mfu"), ".1%"),
                number(of.get("validation_loss"), ".4f"),
                _durations(of.get("step_time_interval")),
                number(of.get("tps"), ",.0f"),
                number(of.get("tflops"), ".4g"),
                duration(of.get("data_time_s")),
                number(of.get("communication_gib"), ".3g", " GiB"),
                duration(of.get("first_step_s")),
                duration(of.get("compile_s")),
            ]
        )
    return table("Numbers of each side", head, rows, texts=2)


def pairs(document: Document) -> Html:
    head = ["", "loss", "speed", "is not the same", "loss gap", "gap, 99%", "gap may be"]
    head += ["speed ratio", "ratio, 99%", "memory", "memory ratio"]
    rows = []
    for pair in document["pairs"]:
        loss, speed, memory = pair["loss"], pair["speed"], pair["memory"]
        rows.append(
            [
                f"{pair['b']} against {pair['a']}",
                loss["verdict"],
                speed["verdict"],
                "; ".join(pair["comparable"]["told"]) or "-",
                number(loss["gap"], "+.3g" if loss["gap"] else ".3g"),
                _range(loss["interval"], "+.3g"),
                number(loss["envelope"], ".3g"),
                number(speed["ratio"], ".3f"),
                _range(speed["interval"], ".3f"),
                f"{number(memory['b_gib'], '.2f')} and {number(memory['a_gib'], '.2f', ' GiB')}",
                number(memory["ratio"], ".3f"),
            ]
        )
    return table("Verdicts of each pair", head, rows, texts=4)


def at_equal(document: Document) -> Html | None:
    """None where no pair has it."""
    shown = {"tokens": scaled, "flops": lambda value: scaled(value, "FLOP"), "seconds": duration}
    rows = [
        [
            f"{pair['b']} against {pair['a']}",
            "time" if along == "seconds" else "FLOPs" if along == "flops" else along,
            shown[along](at["spent"]),
            f"{pair['b']} {number(at['b'], '.4f')}",
            f"{pair['a']} {number(at['a'], '.4f')}",
            number(at["b"] - at["a"], "+.4f"),
        ]
        for pair in document["pairs"]
        for along, at in pair["loss"]["at_equal"].items()
    ]
    head = ["", "at equal", "spent", "loss", "against", "difference"]
    return table("Losses where both have spent as much", head, rows, texts=2) if rows else None


def target(document: Document) -> Html | None:
    """What it took to reach the target; None where there is none."""
    ratios = {pair["b"]: (pair["a"], pair["target"]) for pair in document["pairs"] if "target" in pair}
    rows = []
    for side in document["sides"]:
        if found := side["summary"].get("target"):
            against, ratio = ratios.get(side["name"], ("", {}))
            took = {"step": number(found["step"], ",.0f")}
            took |= {"tokens": scaled(found["tokens"]), "seconds": duration(found["seconds"])}
            cells = [took[what] + _times(ratio.get(what), against) for what in took]
            name = side_name(document, side["name"])
            rows.append([name, side["label"], f"{found['reached']} of {len(side['runs'])} runs", *cells])
    head = ["", "recipe", "reached", "step", "tokens", "time"]
    return table("What the target loss took", head, rows, texts=2) if rows else None


def config_difference(document: Document) -> Html | None:
    """Keys by section, a column a side; None where all are the same."""
    rows: list[Sequence[object]] = []
    section = ""
    for name in _keys(pair["config_diff"] for pair in document["pairs"]):
        if name[0] != section:
            section = name[0]
            rows.append([tag("span", f"[{section}]", class_="section")])
        rows.append([name[1], *_values(document, f"{name[0]}.{name[1]}")])
    return table("Settings that differ", ["setting", *_columns(document)], rows, 99) if rows else None


def derived_difference(document: Document) -> Html | None:
    names = dict.fromkeys(name for pair in document["pairs"] for name in pair["derived_diff"])
    rows = [[name, *_values(document, name)] for name in names]
    return table("What follows from them", ["", *_columns(document)], rows, 99) if rows else None


def breakdown(document: Document) -> Html | None:
    """What steps were spent on, as bars; None where no side was profiled."""
    known = [(side, found) for side in document["sides"] if (found := side["summary"].get("breakdown"))]
    if not known:
        return None
    parts = list(dict.fromkeys(name for _, found in known for name in found))
    kinds = {name: _kind(name, parts) for name in parts}
    rows = []
    for side, found in known:
        values = {name: max(0.0, finite(found.get(name)) or 0.0) for name in parts}
        whole = sum(values.values()) or 1.0
        bar = tag("div", *(_segment(values[name] / whole, kinds[name], _part(name)) for name in parts), class_="stack")
        cells = [f"{value / whole:.1%}" for value in values.values()]
        rows.append([side_name(document, side["name"]), side["label"], bar, *cells])
    head = [joined([tag("span", class_=f"key {kinds[name]}"), " ", _part(name)]) for name in parts]
    return table("What a step is spent on", ["", "recipe", "share of a step", *head], rows, texts=3)


def unfit(document: Document) -> Html | None:
    """What could not run, or not to its end; None where all could."""
    rows = [["refused", f"{each['name']}: {each['what']}", each["told"]] for each in document["refused"]]
    rows += [["failed", f"{each['name']}: {each['source']}", each["told"]] for each in document["failed"]]
    for side in document["sides"]:
        rows += [
            [run["state"], f"{side['name']}: {run['folder']}", run["told"]]
            for run in side["runs"]
            if run["state"] != "finished"
        ]
    return table("What could not run to its end", ["", "what", "why"], rows, 3) if rows else None


def assertions(document: Document) -> Html | None:
    rows = []
    for each in document["assertions"]:
        kind, sign = ("good", "✓ holds") if each["holds"] else ("bad", "✗ fails")
        rows.append([tag("span", sign, class_=f"badge {kind}"), tag("code", each["condition"]), each["told"]])
    return table("Conditions", ["", "condition", "why"], rows, 3) if rows else None


def sources(document: Document) -> Html:
    rows = [
        [
            side_name(document, side["name"]),
            side["model"],
            tag("code", " ".join((side["source"], *side["given"]))),
            tag("code", " extends ".join(map(str, side["chain"]))) if side["chain"] else "-",
        ]
        for side in document["sides"]
    ]
    return table("Where sides come from", ["", "model", "named as", "files"], rows, 4)


def folders(document: Document) -> Html:
    rows = [
        [
            side_name(document, side["name"]),
            tag("code", run["folder"]),
            run["state"],
            UNKNOWN if run["seed"] is None else run["seed"],
            len(run["curve"].get("step", [])),
        ]
        for side in document["sides"]
        for run in side["runs"]
    ]
    return table("Folders of the runs", ["", "folder", "state", "seed", "logged steps"], rows, 3)


def _range(interval: Sequence[Any] | None, form: str) -> str:
    return UNKNOWN if interval is None else " to ".join(number(each, form) for each in interval)


def _ends(ranks: Sequence[float] | None) -> str:
    """The smallest and the largest."""
    return f"{number(min(ranks), '.2f')} to {number(max(ranks), '.2f', ' GiB')}" if ranks else UNKNOWN


def _durations(interval: Sequence[Any] | None) -> str:
    """The unit once, where both have the same."""
    if interval is None:
        return UNKNOWN
    low, high = map(duration, interval)
    unit = high.rpartition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} to {high}"


def _times(ratio: float | None, against: str) -> str:
    return "" if ratio is None else f" ({ratio:.2f} x {against})"


def _keys(differences: Iterator[Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """(section, key), each once, sections together."""
    found: dict[str, dict[str, None]] = {}
    for difference in differences:
        for section, keys in difference.items():
            found.setdefault(section, {}).update(dict.fromkeys(keys))
    return [(section, key) for section, keys in found.items() for key in keys]


def _columns(document: Document) -> list[str]:
    pairs = document["pairs"]
    return [pairs[0]["a"], *(pair["b"] for pair in pairs)] if pairs else []


def _values(document: Document, name: str) -> list[Html]:
    """Of each column. Where a pair does not differ in `name`, its second side has what the first has."""
    section, _, key = name.rpartition(".")
    found = [
        pair["config_diff"].get(section, {}).get(key) or pair["derived_diff"].get(name) for pair in document["pairs"]
    ]
    first = next(both[0] for both in found if both is not None)
    cells = [_value(first)]
    for both in found:
        cells.append(tag("span", _value(both[1]), class_="other") if both else _value(first))
    return cells


def _value(value: Any) -> Html:
    written = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return tag("code", written)


def _part(name: str) -> str:
    return name.removesuffix("_s").removesuffix("_share").replace("_", " ")


def _kind(name: str, parts: Sequence[str]) -> str:
    known = next((index for index, part in enumerate(_PARTS) if part[:4] in name), None)
    return f"p{len(_PARTS) + parts.index(name) % 4 if known is None else known}"


def _segment(share: float, kind: str, name: str) -> Html:
    return tag("span", class_=f"part {kind}", style=f"width:{share:.4%}", title=f"{name} {share:.1%}")
