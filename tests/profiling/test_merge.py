"""`torchtitan-lite trace`: phases of all ranks in one picture, and what is wrong with them named."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.cli import main
from torchtitan_lite.observability import phases
from torchtitan_lite.observability.phases import Clock

_MS = 1_000_000


def _head(rank: int, attempt: int = 1, ranks: int = 2, error_ns: int = 0) -> str:
    head = {"rank": rank, "world_size": ranks, "attempt": attempt, "host": f"node{rank}", "clock_error_ns": error_ns}
    return json.dumps(head)


def _span(name: str, step: int, begin_ms: int, end_ms: int) -> str:
    return json.dumps({"phase": name, "step": step, "begin_ns": begin_ms * _MS, "end_ns": end_ms * _MS})


def _write(folder: Path, rank: int, *lines: str, end: str = "\n") -> None:
    (folder / "phases").mkdir(exist_ok=True)
    (folder / "phases" / f"rank{rank}.jsonl").write_text("\n".join(lines) + end)


def _named(trace: dict[str, Any], kind: str, name: str) -> list[dict[str, Any]]:
    return [each for each in trace["traceEvents"] if (each["ph"], each["name"]) == (kind, name)]


def test_ranks_stand_in_order_on_one_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (10, 2, 0):
        _write(tmp_path, rank, _head(rank, ranks=1), _span("load", 1, 1000 + rank, 1001 + rank))
    _write(tmp_path, 1, _head(1, ranks=1, error_ns=40_000), _span("forward", 1, 1003, 1004), _span("x", 1, 1002, 1009))
    assert main(["trace", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr()
    said = f"{tmp_path / 'out.json'}: 5 phases of 4 ranks in 1 attempt; clocks agreed within 0.040 ms"
    assert shown.out.startswith(said)
    assert shown.err == ""
    trace = json.loads((tmp_path / "out.json").read_text())
    rows = [(each["pid"], each["args"]["name"]) for each in _named(trace, "M", "process_name")]
    assert rows == [(1, "rank 0 (node0)"), (2, "rank 1 (node1)"), (3, "rank 2 (node2)"), (11, "rank 10 (node10)")]
    assert [each["args"]["sort_index"] for each in _named(trace, "M", "process_sort_index")] == [0, 1, 2, 10]
    loads = _named(trace, "X", "load")
    at = [(each["pid"], each["ts"], each["dur"]) for each in loads]
    assert at == [(1, 0, 1000), (3, 2000, 1000), (11, 10000, 1000)]
    order = [each["name"] for each in trace["traceEvents"] if each["ph"] == "X" and each["pid"] == 2]
    assert order == ["x", "forward"], "what holds another comes first"
    assert trace["otherData"] == {"began_unix_ns": str(1000 * _MS)}


def test_all_attempts_are_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (_head(0, 1, 1), _span("load", 1, 5, 6), _head(0, 2, 1), _span("load", 1, 9, 10))
    _write(tmp_path, 0, *lines)
    assert main(["trace", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "trace": str(tmp_path / "phases" / "trace.json"),
        **{"ranks": 1, "attempts": 2, "spans": 2, "clock_error_ms": 0.0, "warnings": []},
    }
    spans = _named(json.loads(Path(report["trace"]).read_text()), "X", "load")
    assert [(each["ts"], each["args"]) for each in spans] == [
        (0, {"step": 1, "attempt": 1}),
        (4000, {"step": 1, "attempt": 2}),
    ]


def test_what_is_damaged_or_missing_is_named_and_the_rest_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = _span("load", 1, 5, 6)
    later = _span("load", 2, 8, 7)
    lines = (good, _head(0, ranks=3), good, "{oops", '{"phase": "load"}', later, good, '{"phase": "lo')
    _write(tmp_path, 0, *lines, end="")
    _write(tmp_path, 2, _head(2, ranks=3), good)
    assert main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert ": 3 phases of 2 ranks" in shown.out
    path = tmp_path / "phases" / "rank0.jsonl"
    assert shown.err.splitlines() == [
        f"warning: {path}, line 1: comes before any that says which attempt it is of; it is left out",
        f"warning: {path}, line 4: is not JSON; it is left out",
        f"warning: {path}, line 5: is no phase of this version; it is left out",
        f"warning: {path}, line 6: ends before it begins; it is left out",
        f"warning: {path}, line 8: is cut; it is left out",
        "warning: attempt 1 had 3 ranks, and of 1 there are no phases",
    ]


def test_where_there_is_nothing_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert "none: no such run; name a run folder" in capsys.readouterr().err
    assert main(["trace", str(tmp_path)]) == 2
    assert "has no phases recorded; run it with profiling.phases = true" in capsys.readouterr().err
    _write(tmp_path, 0, "{oops")
    assert main(["trace", str(tmp_path)]) == 2
    assert "has no phases recorded (" in capsys.readouterr().err
    _write(tmp_path, 0, _head(0, ranks=1), _span("load", 1, 5, 6))
    assert main(["trace", str(tmp_path), "--out", str(tmp_path / "no" / "where.json")]) == 2
    assert "cannot be written: No such file or directory; choose another --out" in capsys.readouterr().err


def test_what_is_recorded_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with phases.recorded(tmp_path, 0, Clock(10**18, 0), world_size=1, attempt=1):
        phases.begin("loading data", 1)
        phases.begin("forward and backward", 1)
        with phases.span("forward"):
            phases.begin("forward and backward", 1)
        phases.begin("optimizer step", 1)
        phases.begin("", 1)
        phases.begin("loading data", 2)
    assert main(["trace", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    trace = json.loads(Path(report["trace"]).read_text())
    assert int(trace["otherData"]["began_unix_ns"]) > 10**18, "by the first rank's clock"
    events = trace["traceEvents"]
    spans = {(each["name"], each["args"]["step"]): each for each in events if each["ph"] == "X"}
    assert list(spans) == [
        *(("load", 1), ("forward_backward", 1), ("forward", 1), ("optimizer", 1), ("load", 2)),
    ]
    outer, inner = spans["forward_backward", 1], spans["forward", 1]
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_phases_cost_nothing_where_none_are_recorded() -> None:
    phases.begin("loading data", 1)
    assert phases.span("forward").__class__.__name__ == "nullcontext"
    assert not phases.recording()


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with phases.recorded(tmp_path, 0, Clock(0, 0)):
        (tmp_path / "phases" / "rank0.jsonl").mkdir()
        phases.begin("loading data", 1)
    (tmp_path / "taken").write_text("")
    with phases.recorded(tmp_path / "taken", 0, Clock(0, 0)):
        assert not phases.recording()
