"""`torchtitan-lite trace`: the phases of all ranks of a run in one Chrome trace. No torch."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.phases import PHASES
from torchtitan_lite.strict_json import strict_dumps

_FILE = re.compile(r"rank(\d+)\.jsonl")
_HEAD = ("attempt", "world_size", "host", "clock_error_ns")
_SPAN = {"phase": str, "step": int, "begin_ns": int, "end_ns": int}


@dataclass
class Recorded:
    """What one rank has written. heads: the first line of each attempt. spans: with the attempt of each. damaged: lines
    that are left out, in words."""

    rank: int
    heads: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def run(run_folder: str, out: str | None, *, as_json: bool) -> int:
    """Write the trace; return the exit code. Raises UserError."""
    folder = Path(run_folder)
    ranks = read_phases(folder)
    path = Path(out) if out else folder / PHASES / "trace.json"
    lines = [line for each in ranks for line in (*each.damaged, *_missing(each, ranks))]
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    try:
        path.write_text(strict_dumps(chrome_trace(ranks)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --out") from None
    spans = sum(len(each.spans) for each in ranks)
    attempts = len({head["attempt"] for each in ranks for head in each.heads})
    error_ms = max(head["clock_error_ns"] for each in ranks for head in each.heads) / 1e6
    report = {
        "trace": str(path),
        "ranks": len(ranks),
        "attempts": attempts,
        "spans": spans,
        "clock_error_ms": error_ms,
        "warnings": lines,
    }
    if as_json:
        print(strict_dumps(report, indent=1))
    else:
        clocks = f"; clocks agreed within {error_ms:.3f} ms at the start" if error_ms else ""
        print(
            f"{path}: {_count(spans, 'phase')} of {_count(len(ranks), 'rank')} in {_count(attempts, 'attempt')}"
            f"{clocks}; open it at ui.perfetto.dev or chrome://tracing"
        )
    return 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def read_phases(folder: Path) -> list[Recorded]:
    """What each rank of a run has recorded, in their order. Raises UserError where that is nothing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; name a run folder (job.dump_folder)")
    found = {int(match[1]): path for path in (folder / PHASES).glob("*") if (match := _FILE.fullmatch(path.name))}
    ranks = [_read(path, rank) for rank, path in sorted(found.items())]
    if not any(each.spans for each in ranks):
        damaged = f" ({ranks[0].damaged[0]})" if ranks and ranks[0].damaged else ""
        raise UserError(f"{folder}: has no phases recorded{damaged}; run it with profiling.phases = true")
    return ranks


def chrome_trace(ranks: Sequence[Recorded]) -> dict[str, Any]:
    """In the Trace Event Format: a process for each rank, times in microseconds from the first phase on."""
    origin = min(span["begin_ns"] for each in ranks for span in each.spans)
    return {
        "traceEvents": [event for each in ranks for event in _events(each, origin)],
        "displayTimeUnit": "ms",
        "otherData": {"began_unix_ns": str(origin)},
    }


def _events(recorded: Recorded, origin: int) -> Iterator[dict[str, Any]]:
    # Viewers take process 0 for the idle one.
    at = {"pid": recorded.rank + 1, "tid": recorded.rank + 1}
    hosts = ", ".join(dict.fromkeys(str(head["host"]) for head in recorded.heads))
    yield {"ph": "M", "name": "process_name", **at, "args": {"name": f"rank {recorded.rank} ({hosts})"}}
    yield {"ph": "M", "name": "process_sort_index", **at, "args": {"sort_index": recorded.rank}}
    yield {"ph": "M", "name": "thread_name", **at, "args": {"name": "phases"}}
    for span in sorted(recorded.spans, key=lambda span: (span["begin_ns"], -span["end_ns"])):
        yield {
            "ph": "X",
            "name": span["phase"],
            "cat": "phase",
            **at,
            "ts": (span["begin_ns"] - origin) / 1000,
            "dur": (span["end_ns"] - span["begin_ns"]) / 1000,
            "args": {"step": span["step"], "attempt": span["attempt"]},
        }


def _read(path: Path, rank: int) -> Recorded:
    recorded = Recorded(rank)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; mend it or its permissions") from None
    *lines, rest = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if why := _take(recorded, line):
            recorded.damaged.append(f"{path}, line {number}: {why}; it is left out")
    if rest:
        recorded.damaged.append(f"{path}, line {len(lines) + 1}: is cut; it is left out")
    return recorded


def _take(recorded: Recorded, line: str) -> str:
    """Why the line is not taken; empty where it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        return "is not JSON"
    if all(key in entry for key in _HEAD):
        recorded.heads.append(entry)
        return ""
    if not all(isinstance(entry.get(key), kind) for key, kind in _SPAN.items()):
        return "is no phase of this version"
    if not recorded.heads:
        return "comes before any that says which attempt it is of"
    if entry["end_ns"] < entry["begin_ns"]:
        return "ends before it begins"
    recorded.spans.append({**entry, "attempt": recorded.heads[-1]["attempt"]})
    return ""


def _missing(recorded: Recorded, ranks: Sequence[Recorded]) -> Iterator[str]:
    """Told by the first: ranks that an attempt had and nothing is known of."""
    if recorded is not ranks[0]:
        return
    of_attempts = {head["attempt"]: head["world_size"] for each in ranks for head in each.heads}
    for attempt, size in sorted(of_attempts.items()):
        there = {each.rank for each in ranks for head in each.heads if head["attempt"] == attempt}
        if absent := sorted(set(range(size)) - there):
            yield f"attempt {attempt} had {size} ranks, and of {', '.join(map(str, absent))} there are no phases"
