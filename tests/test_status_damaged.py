"""`torchtitan-lite status` names what is damaged in a run folder, or of another version, in a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.cli import main

NOW = 1_800_000_000.0
START = {"event": "start", "time": NOW, "step": 0, "attempt": 1, "world_size": 2, "mesh": "m", "host": "h"}
LINE = {"step": 1, "loss": 1.0, "step_time_s": 1.0}
STOPPED = {"step": 20, "signal": "SIGTERM", "saved": 20}
# (file, what is in it, the message behind the file's name)
DAMAGED = [
    ("config.json", "[]", ": expected an object, got []"),
    ("config.json", {"config": None}, ": config: expected an object, got null"),
    ("config.json", {"config": {"training": "x"}}, ': config.training: expected an object, got "x"'),
    (
        "config.json",
        {"config": {"training": {"steps": "80"}}},
        ': config.training.steps: expected a whole number, got "80"',
    ),
    ("config.json", {"config": {"checkpoint": {"folder": 3}}}, ": config.checkpoint.folder: expected a string, got 3"),
    ("config.json", {"config": {"model": {"name": 3}}}, ": config.model.name: expected a string, got 3"),
    ("config.json", {"world_size": "2"}, ': world_size: expected a whole number, got "2"'),
    ("stopped.json", '{"step": 2', ": cannot be read, or is not JSON; remove it, the step"),
    (
        "stopped.json",
        "null",
        ": expected an object, got null; it is damaged, or of another version: remove it, the step that is saved stays",
    ),
    ("stopped.json", {"signal": "SIGTERM"}, ": step: expected a whole number, got nothing"),
    ("stopped.json", {**STOPPED, "saved": "20"}, ': saved: expected a whole number, got "20"'),
    ("events.jsonl", {"event": "end", "step": 1}, ", line 1: time: expected seconds, got nothing"),
    ("events.jsonl", {**START, "time": float("nan")}, ", line 1: time: expected seconds, got NaN"),
    ("events.jsonl", {**START, "step": float("inf")}, ", line 1: step: expected a whole number, got Infinity"),
    ("events.jsonl", {**START, "world_size": "2"}, ', line 1: world_size: expected a whole number, got "2"'),
    ("events.jsonl", {**START, "event": "world-size change"}, ", line 1: before: expected a whole number, got nothing"),
    ("events.jsonl", {**START, "event": "validation", "loss": []}, ", line 1: loss: expected a number, got []"),
    ("metrics.jsonl", "\xff", ", line 1: is not JSON"),
    ("metrics.jsonl", {**LINE, "step": float("inf")}, ", line 1: step: expected a whole number, got Infinity"),
    ("metrics.jsonl", {**LINE, "step": True}, ", line 1: step: expected a whole number, got true"),
    ("metrics.jsonl", {**LINE, "step": 10**30}, ", line 1: step: expected a whole number, got 1000"),
    ("metrics.jsonl", {**LINE, "loss": True}, ", line 1: loss: expected a number, got true"),
    ("metrics.jsonl", {**LINE, "step_time_s": "nan"}, ', line 1: step_time_s: expected seconds, got "nan"'),
    ("metrics.jsonl", {**LINE, "step_time_s": 1e300}, ", line 1: step_time_s: expected seconds, got 1e+300"),
    ("metrics.jsonl", {**LINE, "tps": "fast" * 50}, ', line 1: tps: expected a number, got "fastfast'),
]


@pytest.mark.parametrize(("file", "what", "message"), DAMAGED)
def test_what_is_damaged_is_named(
    tmp_path: Path, file: str, what: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, record in (("events.jsonl", START), ("metrics.jsonl", LINE)):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    (tmp_path / file).write_text(what if isinstance(what, str) else json.dumps(what), encoding="latin-1")
    if file.endswith("l"):
        with (tmp_path / file).open("a") as lines:
            lines.write("\n")
    assert main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / file}{message}")
    assert error.count("\n") == 1


def test_what_an_earlier_version_left_out_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.time", lambda: NOW + 1)
    (tmp_path / "config.json").write_text('{"config": {"training": {}}, "world_size": 3}')
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "start", "time": NOW, "step": 4, "attempt": 1}) + "\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**LINE, "step": 5, "attempt": 1, "mfu": None, "tps": 2}) + "\n")
    assert main(["status", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["steps"], told["model"], told["mesh"], told["mfu"]) == (5, None, "", "", None)
    assert (told["ranks"], told["tokens_per_s"], told["grad_norm"]) == (3, 6.0, None)
