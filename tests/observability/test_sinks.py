"""What a run leaves behind: JSON lines, one a record."""

import json
from pathlib import Path

import pytest

from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.sinks import RunLog, read_lines


def test_a_record_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    for step in (1, 2, 3):
        log.metrics({"step": step, "loss": 1.5 / step, "mfu": None})
        lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
        assert len(lines) == step + 1
        assert lines[-1] == ""
    assert json.loads(lines[1]) == {"step": 2, "loss": 0.75, "mfu": None, "attempt": 1}


def test_line_ends_within_a_value_do_not_cut_the_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    log.event("start", 0, mesh="a\nb\u2028c é")
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 1
    assert read_lines(tmp_path / "events.jsonl")[0]["mesh"] == "a\nb\u2028c é"


def test_an_event_says_what_when_and_in_which_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1234.5)
    log = RunLog(tmp_path, writes=True)
    log.event("checkpoint", 40, path="outputs/x", seconds=0.25)
    assert read_lines(tmp_path / "events.jsonl") == [
        {
            "event": "checkpoint",
            "time": 1234.5,
            "step": 40,
            "attempt": 1,
            "path": "outputs/x",
            "seconds": 0.25,
        }
    ]


def test_samples_are_written_with_their_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    log.samples(1, [5, 3])
    log.samples(2, [])
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 1, "ids": [5, 3]}, {"step": 2, "ids": []}]


def test_attempts_count_the_starts(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        log = RunLog(tmp_path, writes=True)
        assert log.attempt == attempt
        log.event("start", 0)
        log.event("checkpoint", 1)
        log.metrics({"step": 1})
    assert [line["attempt"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_start_that_never_was_does_not_count(tmp_path: Path) -> None:
    RunLog(tmp_path, writes=True).event("end", 0)
    assert RunLog(tmp_path, writes=True).attempt == 1


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "start"}\n{"event": "sta')
    assert read_lines(path) == [{"event": "start"}] * 2
    assert RunLog(tmp_path, writes=True).attempt == 3


def test_a_missing_or_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nowhere.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_lines(tmp_path / "empty.jsonl") == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start"}\n{"event": "\xff"}\n')
    with pytest.raises(UserError, match=r"events.jsonl, line 2: is not JSON"):
        read_lines(tmp_path / "events.jsonl")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read: Is a directory"):
        read_lines(tmp_path / "metrics.jsonl")


def test_who_does_not_write_leaves_nothing_and_counts_all_the_same(tmp_path: Path) -> None:
    RunLog(tmp_path, writes=True).event("start", 0)
    before = (tmp_path / "events.jsonl").read_bytes()
    log = RunLog(tmp_path, writes=False)
    log.metrics({"step": 1})
    log.samples(1, [1])
    log.event("start", 0)
    assert log.attempt == 2
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    assert (tmp_path / "events.jsonl").read_bytes() == before


def test_a_cut_last_line_is_gone_before_the_next_record(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start", "step": 0}\n{"event": "sta')
    RunLog(tmp_path, writes=True).event("start", 3)
    again = RunLog(tmp_path, writes=True)
    assert again.attempt == 3
    assert [line["step"] for line in read_lines(tmp_path / "events.jsonl")] == [0, 3]


def test_a_loss_that_is_no_number_is_still_json(tmp_path: Path) -> None:
    RunLog(tmp_path, writes=True).metrics({"step": 1, "loss": float("nan")})
    assert '"loss": "nan"' in (tmp_path / "metrics.jsonl").read_text()
