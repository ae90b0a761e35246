"""`torchtitan-lite status`: from folders made by hand, to the letter; and live, on a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite import status
from torchtitan_lite.cli import main
from torchtitan_lite.observability.run_view import RunReader
from torchtitan_lite.observability.terminal import bar, clipped, duration, one_line, sparkline
from torchtitan_lite.preflight import run_folder_held

NOW = 1_800_000_000.0


def _event(folder: Path, name: str, step: int, at: float, attempt: int = 1, **more: Any) -> None:
    line = {"event": name, "time": NOW + at, "step": step, "attempt": attempt, **more}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    os.utime(folder / "events.jsonl", (NOW + at, NOW + at))


def _metrics(folder: Path, step: int, loss: float | str, at: float, attempt: int = 1, **more: Any) -> None:
    line = {"step": step, "loss": loss, "grad_norm": 0.5, "lr": 3e-4, "step_time_s": 2.0, "tps": 1408.2, "mfu": None}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "memory_peak_gib": 0.71, "attempt": attempt, **more}) + "\n")
    os.utime(folder / "metrics.jsonl", (NOW + at, NOW + at))


def _config(folder: Path, steps: int = 80) -> None:
    folder.mkdir(exist_ok=True)
    config = {"model": {"name": "llama3", "flavor": "debugmodel"}, "training": {"steps": steps}}
    (folder / "config.json").write_text(json.dumps({"config": config, "world_size": 2}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run killed after step 12 and started again on four ranks from step 10, of which 20 steps are logged."""
    monkeypatch.setattr("time.time", lambda: NOW)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    _config(run)
    _event(run, "start", 0, -100, world_size=2, mesh="2 ranks: dp_shard 2")
    for step in range(1, 13):
        _metrics(run, step, 9.0 - 0.5 * step, -100 + 2 * step)
    checkpoint = run / "checkpoint" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    os.utime(checkpoint / "manifest.json", (NOW - 78, NOW - 78))
    _event(run, "checkpoint", 10, -78, path="x")
    _event(run, "start", 10, -30, 2, world_size=4, mesh="4 ranks: dp_shard 4")
    _event(run, "world-size change", 10, -29, 2, before=2, now=4)
    for step in range(11, 21):
        _metrics(run, step, 9.0 - 0.4 * step, -21 + step, 2, step_time_s=1.0)
    _event(run, "validation", 20, -0.5, 2, loss=1.25)
    return run


def _shown(*runs: str) -> str:
    stream = io.StringIO()
    assert status.run(runs, as_json=False, once=False, stream=stream) == 0
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)


def test_a_run_that_goes_on_to_the_letter(folder: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert status.run(["run"], as_json=False, once=False, stream=stream) == 0
    stream.seek(0)
    assert stream.read() == (
        "run  running\n"
        "llama3 debugmodel, 4 ranks: dp_shard 4\n"
        "[###########---------------------------------]  step 20/80  25%  1 min 00 s left\n"
        "loss        1.0000    ██▇▇▆▆▅▅▄▄▄▄▄▃▃▂▂▂▁▁\n"
        "grad norm   0.5000    lr 3.00e-04   step 1.0 s\n"
        "tokens/s    5,633 (1,408 a rank)   memory 0.71 GiB\n"
        "validation  1.2500 at step 20\n"
        "checkpoint  step 10, 1 min 18 s ago\n"
        "attempts    2, 1 restart\n"
        "ranks       2 to 4 at step 10\n"
        "last line   0.5 s ago\n"
    )


def test_what_goes_wrong_is_told(folder: Path) -> None:
    _event(folder, "skipped step", 20, -0.4, 2, why="loss spike")
    _event(folder, "checkpoint failed", 20, -0.3, 2, error="No space\nleft")
    _event(folder, "stall", 20, -0.2, 2, report="error: step 21 has hung\x1b[2J for 100 s")
    told = _shown("run").splitlines()
    assert told[0] == "run  failed: stall"
    assert told[-3:] == [
        "skipped     1 step, the last one step 20: loss spike",
        "trouble     0.3 s ago: checkpoint failed at step 20: No space left",
        "trouble     0.2 s ago: stall at step 20: error: step 21 has hung [2J for 100 s",
    ]
    assert "left" not in told[2]


def test_steps_that_came_again_count_once(folder: Path) -> None:
    view = RunReader(folder).read()
    assert [step for step, _ in view.curve] == list(range(1, 21))
    assert view.curve[10] == (11, 9.0 - 0.4 * 11)
    assert view.step_time_s() == 1.0, "of this attempt"


def _state(monkeypatch: pytest.MonkeyPatch, later: float) -> str:
    monkeypatch.setattr("time.time", lambda: NOW + later)
    return _shown("run").splitlines()[0]


def test_states_without_a_lock_to_look_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _state(monkeypatch, 29) == "run  running"
    assert _state(monkeypatch, 40) == "run  lost: no line for 40 s, usually one each 1.0 s"
    (folder / "stopped.json").write_text('{"step": 20, "signal": "SIGTERM", "saved": 20}')
    assert _state(monkeypatch, 40) == "run  stopped: by SIGTERM at step 20, step 20 is saved"
    _event(folder, "start", 20, 50, 3, world_size=4)
    (folder / "stopped.json").unlink()
    assert _state(monkeypatch, 60) == "run  starting: no step is logged yet"
    _event(folder, "end", 80, 100, 3)
    assert _state(monkeypatch, 9999) == "run  finished"


def test_who_holds_the_folder_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_folder_held(folder):
        _event(folder, "start", 20, -0.1, 3, world_size=4, host=os.uname().nodename)
        _metrics(folder, 21, 1.0, 0, 3, step_time_s=1.0)
        if status._held(folder, os.uname().nodename) is None:
            pytest.skip("this system has no /proc/locks")
        assert _state(monkeypatch, 29) == "run  running"
        assert _state(monkeypatch, 40) == "run  quiet: no line for 40 s, usually one each 1.0 s"
    told = "run  lost: its process has gone; no line for 5.5 s"
    assert _state(monkeypatch, 5.5) == told
    _event(folder, "start", 21, 1, 4, world_size=4, host="another")
    _metrics(folder, 22, 1.0, 2, 4)
    assert _state(monkeypatch, 5) == "run  running", "it is for that host to say"


def test_a_run_that_has_logged_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _config(Path("run"))
    assert _shown("run").splitlines()[0] == "run  starting: nothing is logged yet"
    os.utime("run/config.json", (1, 1))
    assert _shown("run").splitlines()[0] == "run  lost: it has never logged anything"


def test_a_cut_line_waits_for_its_end_and_another_run_begins_anew(folder: Path) -> None:
    reader, path = RunReader(folder), folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert reader.read().step == 19
    path.write_bytes(whole)
    assert reader.read().step == 20
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert reader.read().step == 1


def test_losses_that_are_not_finite_and_settings_unknown(folder: Path) -> None:
    (folder / "config.json").unlink()
    _metrics(folder, 21, "nan", 0, 2, mfu=0.4567)
    told = _shown("run")
    assert "step        21 of ?" in told
    assert re.search(r"^loss        nan       .*x$", told, re.MULTILINE)
    assert "mfu 45.7%" in told


def test_several_runs_make_a_table(folder: Path) -> None:
    name = "a-folder-with-quite-a-long-name/" + "sub-" * 8 + "end"
    Path(name).mkdir(parents=True)
    _config(Path(name), steps=100_000)
    _event(Path(name), "start", 0, -5, world_size=2, mesh="m")
    _event(Path(name), "stall", 0, -4, report="why")
    cut = f"{name}  failed: stall"[:79] + ">"
    assert _shown("run", name).splitlines() == [
        "RUN                       STATE        STEP        LEFT    LOSS  TOKENS/S  SAVED",
        "run                       running     20/80  1 min 00 s  1.0000     5,633     10",
        "<sub-sub-sub-sub-sub-end  failed   0/100000                 n/a       n/a",
        cut,
        f"{name}  4.0 s ago: stall"[:79] + ">",
    ]


@pytest.mark.parametrize("width", [1, 10, 40])
def test_a_narrow_terminal_wraps_nothing(folder: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert max(map(len, _shown("run").splitlines())) <= width
    assert max(map(len, _shown("run", "run").splitlines())) <= width


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["steps"], told["eta_s"], told["checkpoint_step"]) == (
        "running",
        20,
        80,
        60.0,
        10,
    )
    assert main(["status", "run", "run", "--json"]) == 0
    assert [entry["run"] for entry in json.loads(capsys.readouterr().out)] == ["run", "run"]


def test_a_later_checkpoint_is_seen(folder: Path) -> None:
    run = status.Run("run")
    assert run.status().checkpoint_step == 10
    (saved := folder / "checkpoint" / "step-00000020").mkdir()
    (saved / "manifest.json").write_text("{}")
    assert run.status().checkpoint_step == 10  # looked for where a line says so
    _event(folder, "checkpoint", 20, -1, 2)
    assert run.status().checkpoint_step == 20


MISTAKES = {
    "missing": ("nowhere", "error: nowhere: no such folder; name the run folder"),
    "a file": ("run/config.json", "error: run/config.json: is no folder; name"),
    "the folder of runs": (".", "error: .: is no run folder, it has no config.json, metrics.jsonl, events.jsonl; name"),
    "metrics of another kind": (
        "old",
        "error: old/metrics.jsonl, line 1: loss: expected a number, got nothing; it",
    ),
    "no json": ("torn", "error: torn/metrics.jsonl, line 1: is not JSON"),
    "config": ("odd", "error: odd/config.json: is not a config.json of ours"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file, text in (
        ("old", "metrics.jsonl", '{"step": 1}\n'),
        ("torn", "metrics.jsonl", "[1\n"),
        ("odd", "config.json", "{"),
    ):
        Path(name).mkdir()
        (Path(name) / file).write_text(text)
    name, message = MISTAKES[what]
    assert main(["status", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_one_that_cannot_be_read_does_not_hide_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _config(Path("torn"))
    Path("torn/metrics.jsonl").write_text("[1\n")
    assert main(["status", "nowhere", "run", "torn"]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["RUN", "STATE", "STEP"],
        ["nowhere", "unreadable", "n/a"],
        ["run", "running", "20/80"],
        ["torn", "unreadable", "n/a"],
    ]
    assert lines[4].startswith("nowhere  unreadable: no such folder; name the run folder")
    assert lines[5] == "torn  unreadable: torn/metrics.jsonl, line 1: is not JSON; mend or remove the l>"
    assert err.splitlines() == [
        "error: nowhere: no such folder; name the run folder (job.dump_folder), as in outputs/llama3_debug",
        "error: torn/metrics.jsonl, line 1: is not JSON; mend or remove the line",
    ]
    assert main(["status", "nowhere", "run", "--json"]) == 2
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], first["step"], first["attempts"], second["step"]) == ("unreadable", None, None, 20)
    assert first["told"].startswith("no such folder")


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_view_of_several_waits_for_none_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _event(folder, "end", 80, 0, 2)
    stream = _Tty()
    assert status.run(["nowhere", "run"], as_json=False, once=False, stream=stream) == 2
    assert re.search(r"nowhere +unreadable.*run +finished +20/80", stream.getvalue(), re.DOTALL)
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300])
def test_a_name_that_can_be_no_folder_is_told_among_the_others(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", name, "run"]) == 2
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:3]] == ["unreadable", "running"]
    assert main(["status", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_one_that_is_mended_while_it_is_watched_is_read_from_its_beginning(folder: Path) -> None:
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole.replace('{"step": 3,', '{"stop": 3,'))
    watched = status._Watched("run", alone=False)
    assert [watched.status().state for _ in range(2)] == ["unreadable"] * 2
    (folder / "metrics.jsonl").write_text(whole)
    os.utime(folder / "metrics.jsonl", (NOW, NOW))
    assert (watched.status().step, watched.error) == (20, None)


def test_pieces() -> None:
    assert [bar(share, 12) for share in (-1, 0.5, 2)] == ["[----------]", "[#####-----]", "[##########]"]
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 4) == "▁▃▆█"
    assert sparkline([1, 1], 9, plain=True) == "__"
    assert sparkline([], 9) == ""
    assert [duration(s) for s in (0.04, 9.96, 59.4, 59.6, 65, 12000, 187_200)] == [
        "0.0 s",
        "10 s",
        "59 s",
        "1 min 00 s",
        "1 min 05 s",
        "3 h 20 min",
        "2 d 04 h",
    ]
    assert clipped("abcdef", 4) == "abc>"
    assert one_line("a\nb\x1b") == "a b "


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would their children


class _Terminal:
    """A pseudo-terminal of 80 by 24 with `status` in it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        keep = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        command = [sys.executable, "-m", "torchtitan_lite", "status", str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**keep, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment},
        )
        os.close(theirs)
        self.text = ""

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + 20
        while not re.search(pattern, self.text, re.DOTALL):
            assert time.monotonic() < deadline, self.text
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._ours, 65536).decode()
                except OSError:  # the other side has gone
                    time.sleep(0.05)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminals() -> Iterator[list[_Terminal]]:
    opened: list[_Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def _live_run(folder: Path) -> None:
    _config(folder, steps=3)
    at = time.time() - NOW
    _event(folder, "start", 0, at, world_size=1, mesh="1 rank")
    _metrics(folder, 1, 5.0, at)


def test_the_live_view_draws_over_itself_and_ends_with_the_run(tmp_path: Path, terminals: list[_Terminal]) -> None:
    _live_run(tmp_path)
    terminal = _Terminal(tmp_path)
    terminals.append(terminal)
    terminal.until(r"\x1b\[32m[^\n]*running\x1b\[0m\x1b\[K\r\n.*step 1/3 .*last line.*\x1b\[J")
    _metrics(tmp_path, 2, 4.0, time.time() - NOW)
    terminal.until(r"\x1b\[8F.*step 2/3 .*last line.*\x1b\[J")
    _metrics(tmp_path, 3, 3.0, time.time() - NOW)
    _event(tmp_path, "end", 3, time.time() - NOW)
    terminal.until(r"\x1b\[8F.*step 3/3  100%")
    assert terminal.process.wait(10) == 0
    assert "\x1b[2J" not in terminal.text


def test_ctrl_c_leaves_the_live_view_with_code_0(tmp_path: Path, terminals: list[_Terminal]) -> None:
    _live_run(tmp_path)
    terminal = _Terminal(tmp_path, NO_COLOR="1")
    terminals.append(terminal)
    terminal.until(r"step 1/3 .*last line")
    terminal.type("\x03")
    assert terminal.process.wait(10) == 0
    assert "\x1b[32m" not in terminal.text
    assert "Traceback" not in terminal.text
