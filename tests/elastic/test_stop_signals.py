"""Signals that a rank holds until the end of a step, and what ends it when no such end comes."""

import signal
import subprocess
import sys
import time

import pytest

# A rank in a step that never ends.
_RANK = """
import signal, sys, time
from torchtitan_lite.elastic.preemption import StopSignals
signals = StopSignals(float(sys.argv[1]))
signals.hold(signal.SIGTERM, signal.SIGINT)
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if signals.received:
        print("told", signals.received, flush=True)
        break
time.sleep(60)
"""


def _rank(grace_s: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_does_not_come_to_the_end_of_a_step_leaves_after_the_grace_time(number: signal.Signals) -> None:
    process = _rank(0.5)
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert out == f"told {int(number)}\n"
    assert process.returncode == 128 + number
    assert error == (
        f"error: no step was saved within the 0.5 s after {number.name} (elastic.grace_seconds); leaving: the next "
        "start resumes from the checkpoint before\n"
    )


def test_a_second_ctrl_c_leaves_at_once_and_an_echo_of_the_first_does_not() -> None:
    process = _rank(50)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, from the terminal and from torchrun
    time.sleep(0.2)
    assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_second_sigterm_changes_nothing() -> None:
    process = _rank(50)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=20)
