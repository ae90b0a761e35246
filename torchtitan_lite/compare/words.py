"""A comparison in sentences and in a table for the console. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan_lite.observability.terminal import one_line


def of_pair(pair: Mapping[str, Any], a: str, b: str) -> str:
    """What B does against A, in one paragraph."""
    keys = [f"{section}.{key}" for section, values in pair["config_diff"].items() for key in values]
    keys = keys or [key for key in pair["derived_diff"] if "." in key or key == "world_size"]
    differ = f"differ in {_listed(keys)}" if keys else "are the same recipe"
    memory, sent = pair["memory"], pair["communication"]
    sentences = [
        f"{pair['b']} ({b}) and {pair['a']} ({a}) {differ}.",
        *(f"Note: {told}." for told in pair["comparable"]["told"]),
        _loss(pair),
        _speed(pair),
        f"Peak memory of a rank: {memory['b_gib']:.2f} GiB, {_times(memory['ratio'])} {memory['a_gib']:.2f}.",
        _sent(pair["b"], pair["a"], sent["b_gib"], sent["a_gib"]),
    ]
    return " ".join(filter(None, sentences))


def of_all(record: Mapping[str, Any]) -> str:
    """A line of each pair, and what could not be compared."""
    parts = [pair["words"] for pair in record["pairs"]]
    if not parts:
        parts = ["Nothing could be compared: there are no two sides with a run that has logged a step."]
    for side in record["sides"]:
        for run in side["runs"]:
            if run["state"] != "finished":
                parts.append(f"{side['name']} ({side['label']}): {run['folder']} {run['state']}: {run['told']}.")
    parts += [f"Not compared: {each['name']}, {each['source']}: {each['told']}." for each in record["failed"]]
    if record["refused"]:
        parts.append(f"{len(record['refused'])} combinations were refused.")
    for given in dict.fromkeys(" ".join(side["given"]) for side in record["sides"] if side["given"]):
        parts.append(f"Each recipe was run with {given}.")
    return "\n".join(parts)


def table(record: Mapping[str, Any]) -> list[str]:
    """Numbers of each side, then verdicts of each pair, then what was left out and the conditions."""
    head = ("", "recipe", "ranks", "runs", "loss", "step", "tokens/s", "MFU", "memory", "sent a step")
    rows = [(*head, "first step", "compile")]
    for side in record["sides"]:
        summary, finished = side["summary"], sum(run["state"] == "finished" for run in side["runs"])
        rows.append(
            (
                side["name"],
                one_line(side["label"]),
                str(side["ranks"]),
                f"{finished}" if finished == len(side["runs"]) else f"{finished} of {len(side['runs'])}",
                _number(summary.get("loss"), ".4f"),
                _number(summary.get("step_time_s"), ".4g", " s"),
                _number(summary.get("tokens_per_s"), ",.0f"),
                _number(summary.get("mfu"), ".1%"),
                _number(summary.get("memory_peak_gib"), ".2f", " GiB"),
                _number(summary.get("communication_gib"), ".3g", " GiB"),
                _number(summary.get("first_step_s"), ".1f", " s"),
                _number(summary.get("compile_s"), ".1f", " s"),
            )
        )
    lines = _columns(rows)
    if record["pairs"]:
        verdicts = [("", "loss", "gap", "speed", "ratio, 99% interval", "memory")]
        for pair in record["pairs"]:
            loss, speed = pair["loss"], pair["speed"]
            interval = speed["interval"]
            ratio = "" if interval is None else f"{speed['ratio']:.3f}, {interval[0]:.3f} to {interval[1]:.3f}"
            name = f"{pair['b']} against {pair['a']}"
            memory = _number(pair["memory"]["ratio"], ".2f", " x")
            verdicts.append((name, loss["verdict"], _number(loss["gap"], ".2g"), speed["verdict"], ratio, memory))
        lines += ["", *_columns(verdicts)]
    lines += [f"refused  {each['name']}, {each['what']}: {each['told']}" for each in record["refused"]]
    lines += [f"failed   {each['name']}, {each['source']}: {each['told']}" for each in record["failed"]]
    for side in record["sides"]:
        lines += [
            f"{run['state']}  {side['name']}, {run['folder']}: {run['told']}"
            for run in side["runs"]
            if run["state"] != "finished"
        ]
    for each in record["assertions"]:
        lines.append(f"{'holds' if each['holds'] else 'FAILS'}    {each['condition']}: {each['told']}")
    return [one_line(line) for line in lines]


def _loss(pair: Mapping[str, Any]) -> str:
    loss = pair["loss"]
    if loss["verdict"] == "not comparable":
        return f"Their losses are not comparable: {loss['told']}."
    if loss["gap"] is None:
        return f"The losses are different: {loss['told']}."
    if loss["envelope"] is not None:
        kind = "equal, as they should be" if loss["verdict"] == "equal" else "different, and should be equal"
        return f"The losses are {kind} ({loss['told']})."
    low, high = loss["interval"]
    size = f"{abs(loss['gap']):.4f} {'higher' if loss['gap'] > 0 else 'lower'} ({low:+.4f} to {high:+.4f})"
    if loss["verdict"] == "different":
        return f"The loss of {pair['b']} is {size}; {loss['told']}."
    return f"No difference of the losses is shown: {pair['b']}'s is {size}; {loss['told']}."


def _speed(pair: Mapping[str, Any]) -> str:
    speed = pair["speed"]
    if speed["ratio"] is None:
        return f"Their speeds are not comparable: {speed['told']}."
    low, high = speed["interval"]
    size = f"{speed['ratio']:.3f} times the tokens per second ({low:.3f} to {high:.3f} at 99%)"
    if speed["verdict"] == "no difference shown":
        return f"No difference of speed is shown: {pair['b']} has {size}; {speed['told']}."
    return f"{pair['b']} is {speed['verdict']}: {size}; {speed['told']}."


def _sent(b: str, a: str, of_b: float | None, of_a: float | None) -> str:
    """Nothing where neither is known, as of runs on one rank."""
    if of_b is None or of_a is None:
        known = [(name, value) for name, value in ((b, of_b), (a, of_a)) if value is not None]
        return "".join(f"The first rank of {name} sends {value:.3g} GiB a step." for name, value in known)
    return f"The first rank of {b} sends {of_b:.3g} GiB a step, {_times(of_b / of_a if of_a else None)} {of_a:.3g}."


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "against"
    return "as much as" if abs(ratio - 1) < 0.005 else f"{ratio:.2f} times"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
