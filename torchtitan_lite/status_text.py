"""What `torchtitan-lite status` shows: a page of one run, a table of several. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from torchtitan_lite.observability.terminal import Line, bar, clipped, duration, one_line, sparkline

if TYPE_CHECKING:
    from torchtitan_lite.status import Status

_COLOUR = {"running": "good", "finished": "good", "starting": "bold"} | dict.fromkeys(("quiet", "stopped"), "warning")
_LABEL = 12  # columns of the first word of a line


def page(statuses: Sequence[Status], width: int, *, plain: bool = False) -> list[Line]:
    """Lines of at most `width` columns. plain: ASCII only."""
    lines = _one(statuses[0], width, plain) if len(statuses) == 1 else _table(statuses, width)
    return [(clipped(one_line(text), width), colour) for text, colour in lines]


def _one(status: Status, width: int, plain: bool) -> list[Line]:
    lines: list[Line] = [(f"{status.run}  {_state(status)}", _COLOUR.get(status.state, "bad"))]
    if told := ", ".join(filter(None, (status.model, status.mesh))):
        lines.append((told, ""))
    lines.append((_progress(status, width), ""))
    lines += [(text, "") for text in _figures(status, width, plain)]
    lines += [(text, "") for text in _history(status)]
    if status.skipped:
        told = f"{_counted(status.skipped, 'step')}, the last one {status.skipped_last}"
        lines.append((_row("skipped", told), "warning"))
    for age, text in status.troubles:
        wrapped = wrap(
            one_line(f"{duration(age)} ago: {text}"), max(20, width - _LABEL), max_lines=5, placeholder=" ..."
        )
        lines += [(_row("" if number else "trouble", line), "bad") for number, line in enumerate(wrapped)]
    return lines


def _state(status: Status) -> str:
    told = status.told
    if status.state in ("quiet", "lost") and status.last_line_age_s is not None:
        known = status.usual_s is not None and not status.told
        usual = f", usually one each {duration(status.usual_s or 0.0)}" if known else ""
        told = f"no line for {duration(status.last_line_age_s)}{usual}"
        told = f"{status.told}; {told}" if status.told else told
    return f"{status.state}{': ' + told if told else ''}"


def _progress(status: Status, width: int) -> str:
    if not status.steps:
        return _row("step", f"{status.step} of ?")
    share = status.step / status.steps
    left = f"{duration(status.eta_s)} left" if status.eta_s is not None else ""
    told = f"  step {status.step}/{status.steps}  {share:.0%}  {left}".rstrip()
    return f"{bar(share, max(3, width - len(told)))}{told}"


def _figures(status: Status, width: int, plain: bool) -> list[str]:
    if status.loss is None:
        return []
    line = sparkline(status.curve, width - _LABEL - 10, plain)
    mfu = f"   mfu {status.mfu:.1%}" if status.mfu is not None and math.isfinite(status.mfu) else ""
    memory = f"   memory {_figure(status.memory_peak_gib, '.2f')} GiB"
    ranks = f" ({_figure(status.tps, ',.0f')} a rank)" if status.ranks and status.ranks > 1 else ""
    seconds = "" if status.step_time_s is None else f"   step {duration(status.step_time_s)}"
    return [
        _row("loss", f"{_figure(status.loss, '.4f'):<8}  {line}"),
        _row("grad norm", f"{_figure(status.grad_norm, '.4f'):<8}  lr {_figure(status.lr, '.2e')}{seconds}"),
        _row("tokens/s", f"{_figure(status.tokens_per_s, ',.0f')}{ranks}{mfu}{memory}"),
    ]


def _history(status: Status) -> list[str]:
    lines = []
    if status.validation_loss is not None:
        lines.append(_row("validation", f"{_figure(status.validation_loss, '.4f')} at step {status.validation_step}"))
    saved = "none yet"
    if status.checkpoint_step is not None and status.checkpoint_age_s is not None:
        saved = f"step {status.checkpoint_step}, {duration(status.checkpoint_age_s)} ago"
    lines.append(_row("checkpoint", saved))
    if status.attempts > 1:
        lines.append(_row("attempts", f"{status.attempts}, {_counted(status.attempts - 1, 'restart')}"))
    if status.changes:
        told = ", ".join(f"{before} to {now} at step {step}" for step, before, now in status.changes[-3:])
        lines.append(_row("ranks", f"{'...' if len(status.changes) > 3 else ''}{told}"))
    if status.last_line_age_s is not None:
        lines.append(_row("last line", f"{duration(status.last_line_age_s)} ago"))
    return lines


def _table(statuses: Sequence[Status], width: int) -> list[Line]:
    head = ("RUN", "STATE", "STEP", "LEFT", "LOSS", "TOKENS/S", "SAVED")
    rows = [
        (
            one_line(status.run),
            status.state,
            "" if status.state == "unreadable" else f"{status.step}/{status.steps or '?'}",
            "" if status.eta_s is None else duration(status.eta_s),
            _figure(status.loss, ".4f"),
            _figure(status.tokens_per_s, ",.0f"),
            "" if status.checkpoint_step is None else str(status.checkpoint_step),
        )
        for status in statuses
    ]
    widths = [max(len(cells[column]) for cells in (head, *rows)) for column in range(len(head))]
    # The end of a name tells runs of one folder apart.
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(head) - 1)))
    lines = []
    for cells, status in zip((head, *rows), (None, *statuses), strict=True):
        name = cells[0] if len(cells[0]) <= widths[0] else "<" + cells[0][1 - widths[0] :]
        left = [f"{name:<{widths[0]}}", f"{cells[1]:<{widths[1]}}"]
        right = [f"{cell:>{size}}" for cell, size in zip(cells[2:], widths[2:], strict=True)]
        colour = "bold" if status is None else _COLOUR.get(status.state, "bad")
        lines.append(("  ".join((*left, *right)).rstrip(), colour))
    for status in statuses:
        if status.state in ("quiet", "lost", "failed", "stopped", "unreadable"):
            lines.append((f"{status.run}  {_state(status)}", _COLOUR.get(status.state, "bad")))
        lines += [(f"{status.run}  {duration(age)} ago: {text}", "bad") for age, text in status.troubles[-1:]]
    return lines


def _row(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _figure(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
