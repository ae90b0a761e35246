"""Rates from times that are set by hand, and the line that shows them."""

import time
from itertools import pairwise
from typing import Any

import pytest

from torchtitan_lite.observability.metrics import StepClock, console_line


class _Time:
    """Stands in for time.perf_counter."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> _Time:
    stand_in = _Time()
    monkeypatch.setattr(time, "perf_counter", stand_in)
    return stand_in


def _steps(clock: StepClock, clock_time: _Time, count: int, seconds: float, data: float = 0.0) -> None:
    for _ in range(count):
        clock_time.now += seconds
        clock.took_data(data)


def test_rates_of_a_window_by_hand(clock_time: _Time) -> None:
    clock = StepClock(flops_per_token=5e9, tokens_per_step=4000, devices=4, peaks={"mfu": 100.0, "mfu_float8": 160.0})
    _steps(clock, clock_time, count=10, seconds=0.5, data=0.125)
    assert clock.record() == pytest.approx(
        {
            "step_time_s": 0.5,
            "data_time_s": 0.125,
            "tps": 2000.0,  # 40,000 tokens in 5 s on 4 devices
            "tflops": 10.0,  # of one device
            "mfu": 0.1,
            "mfu_float8": 0.0625,
        }
    )


def test_a_record_starts_the_next_window(clock_time: _Time) -> None:
    clock = StepClock(1e9, 100, 1, {})
    _steps(clock, clock_time, count=3, seconds=2.0, data=1.0)
    clock.record()
    _steps(clock, clock_time, count=1, seconds=4.0, data=0.5)
    record = clock.record()
    assert (record["step_time_s"], record["data_time_s"], record["tps"]) == (4.0, 0.5, 25.0)


def test_what_is_paused_does_not_count(clock_time: _Time) -> None:
    clock = StepClock(1e9, 100, 1, {})
    _steps(clock, clock_time, count=1, seconds=2.0)
    with clock.paused():
        clock_time.now += 50.0
    _steps(clock, clock_time, count=1, seconds=2.0)
    with clock.paused():
        clock_time.now += 7.0
    record = clock.record()
    assert record["step_time_s"] == 2.0
    assert record["tps"] == 50.0


def test_what_a_device_has_yet_to_do_counts_before_a_pause(clock_time: _Time) -> None:
    def settle() -> None:
        clock_time.now += 3.0

    clock = StepClock(1e9, 100, 1, {}, settle)
    _steps(clock, clock_time, count=1, seconds=2.0)
    with clock.paused(settled=False):
        pass
    with clock.paused():
        clock_time.now += 50.0
    assert clock.record()["step_time_s"] == 5.0


def test_a_pause_across_a_record_is_the_next_windows_to_leave_out(clock_time: _Time) -> None:
    clock = StepClock(1e9, 100, 1, {})
    _steps(clock, clock_time, count=1, seconds=2.0)
    clock.record()
    with clock.paused():
        clock_time.now += 50.0
    _steps(clock, clock_time, count=1, seconds=3.0)
    assert clock.record()["step_time_s"] == 3.0


def test_restart_forgets_what_was(clock_time: _Time) -> None:
    clock = StepClock(1e9, 100, 1, {})
    _steps(clock, clock_time, count=5, seconds=60.0, data=30.0)
    clock.restart()
    _steps(clock, clock_time, count=2, seconds=1.0, data=0.25)
    record = clock.record()
    assert (record["step_time_s"], record["data_time_s"]) == (1.0, 0.25)


def test_without_a_peak_there_is_no_mfu(clock_time: _Time) -> None:
    clock = StepClock(1e9, 100, 1, {"mfu": None})
    _steps(clock, clock_time, count=1, seconds=1.0)
    assert clock.record()["mfu"] is None


RECORD: dict[str, Any] = {
    "step": 7,
    "loss": 2.34567,
    "grad_norm": 0.98765,
    "lr": 3.14159e-4,
    "tps": 12345.6,
    "tflops": 456.78,
    "mfu": 0.4617,
    "memory_peak_gib": 71.239,
    "data_time_s": 0.00123,
}


def test_the_console_line_holds_every_figure() -> None:
    words = console_line(RECORD).split()
    pairs = {name: value for name, value in pairwise(words) if name.isidentifier()}
    assert pairs["loss"] == "2.3457"
    assert pairs["grad_norm"] == "0.9877"
    assert pairs["lr"] == "3.14e-04"
    assert pairs["tps"] == "12,346"
    assert pairs["tflops"] == "457"
    assert pairs["mfu"] == "46.2%"
    assert pairs["memory"] == "71.24"
    assert pairs["data"] == "1.2"
    assert words[-1] == "ms"


def test_the_console_line_of_a_mixture_shows_how_even_it_is() -> None:
    line = console_line(RECORD | {"moe_aux_loss": 1.04567, "moe_largest_share": 0.2345})
    assert "  aux 1.0457  largest share 23.4%  lr " in line
    even = {"moe_aux_loss": None, "moe_largest_share": 0.125}
    assert "0.9877  largest share 12.5%  lr " in console_line(RECORD | even)
    assert "share" not in console_line(RECORD)


def test_an_unknown_mfu_is_not_a_number() -> None:
    assert "  mfu n/a  " in console_line(RECORD | {"mfu": None})


def test_float8_has_its_own_utilisation_beside() -> None:
    assert "  mfu 46.2%  mfu_float8 31.0%  memory" in console_line(RECORD | {"mfu_float8": 0.31})
    assert "  mfu 46.2%  mfu_float8 n/a  memory" in console_line(RECORD | {"mfu_float8": None})
