"""Which steps are traced, and that nothing is done in the others."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from torchtitan_lite.config.schema import Profiling
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.profiling import profiler
from torchtitan_lite.profiling.profiler import Profiler
from torchtitan_lite.profiling.windows import Window, window_at


def test_the_last_steps_before_each_multiple_are_traced() -> None:
    section = Profiling(enable_profiling=True, profile_freq=10, profiler_warmup=3, profiler_active=2)
    inside = {step: window for step in range(1, 28) if (window := window_at(section, step, 27))}
    assert inside == {
        **{step: Window(6, 9, 10) for step in range(6, 11)},
        **{step: Window(16, 19, 20) for step in range(16, 21)},
    }, "none that the run ends before"


def test_a_window_may_take_all_steps() -> None:
    section = Profiling(enable_profiling=True, profile_freq=2, profiler_warmup=0, profiler_active=2)
    assert [window_at(section, step, 4) for step in (1, 2, 3)] == [Window(1, 1, 2), Window(1, 1, 2), Window(3, 3, 4)]


class _Told(list[str]):
    """What was asked of torch's profiler, in order."""

    def profile(self, **_: Any) -> Any:
        return SimpleNamespace(
            start=lambda: self.append("start"), step=lambda: self.append("next"), stop=lambda: self.append("stop")
        )

    def mark(self, name: str) -> Any:
        self.append(name.removeprefix("torchtitan_lite: "))
        return nullcontext()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> _Told:
    told = _Told()
    monkeypatch.setattr(profiler, "profile", told.profile)
    monkeypatch.setattr(profiler, "patient_group", lambda: None)
    monkeypatch.setattr(profiler, "record_function", told.mark)
    monkeypatch.setattr(Profiler, "_write", lambda self, window: told.append(f"write {window.last}"))
    return told


def _profiler(section: Profiling, steps: int, pausing: Any = None, device: str = "cpu") -> Profiler:
    pausing = pausing or SimpleNamespace(paused=lambda *_: nullcontext())
    here, log = Runtime(0, 1, torch.device(device), "its name"), Any
    return Profiler(section, Path("nowhere"), steps, here, log, pausing, pausing)  # type: ignore[arg-type]


_SECTION = Profiling(enable_profiling=True, profile_freq=5, profiler_warmup=1, profiler_active=2)


def _steps(tried: Profiler, steps: range, told: _Told, stop_at: int = -1) -> None:
    for step in steps:
        told.append(f"({step}")
        tried.begin(step)
        tried.ended(step, stopping=step == stop_at)
        told.append(")")


def test_between_windows_nothing_is_done(told: _Told) -> None:
    _steps(_profiler(_SECTION, 9), range(1, 10), told)
    done = " ".join(told)
    assert done == "(1 ) (2 ) (3 start next ) (4 step 4 next ) (5 step 5 write 5 ) (6 ) (7 ) (8 ) (9 )"


def test_without_profiling_nothing_is_done(told: _Told) -> None:
    _steps(_profiler(Profiling(profile_freq=1, profiler_warmup=0), 3), range(1, 4), told)
    assert " ".join(told) == "(1 ) (2 ) (3 )"


def test_a_window_that_the_run_goes_back_from_or_stops_in_is_let_go(told: _Told) -> None:
    tried = _profiler(_SECTION, 20)
    _steps(tried, range(3, 5), told)
    _steps(tried, range(2, 5), told, stop_at=4)
    assert " ".join(told) == ("(3 start next ) (4 step 4 next ) (2 stop ) (3 start next ) (4 step 4 stop )")
    tried.close()
    assert told[-1] == ")", "once is enough"


def test_a_run_that_starts_within_a_window_warms_up_for_what_is_left(told: _Told) -> None:
    _steps(_profiler(_SECTION, 5), range(4, 6), told)
    assert " ".join(told) == "(4 start step 4 next ) (5 step 5 write 5 )"
    told.clear()
    _steps(_profiler(_SECTION, 5), range(5, 6), told)
    assert " ".join(told) == "(5 )", "a step to be traced has passed"


def test_a_trace_is_in_no_step_s_time_and_no_hang(told: _Told) -> None:
    @contextmanager
    def paused(*_: Any) -> Iterator[None]:
        told.append("{")
        yield
        told.append("}")

    _steps(_profiler(_SECTION, 9, SimpleNamespace(paused=paused)), range(5, 6), told)
    assert told == ["(5", ")"]
    told.clear()
    _steps(_profiler(_SECTION, 9, SimpleNamespace(paused=paused)), range(4, 6), told)
    assert " ".join(told) == "(4 start step 4 next ) (5 step 5 { { write 5 } } )", "of the clock and the watchdog"


def test_a_device_is_awaited_where_a_traced_step_begins_and_ends(told: _Told, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(profiler, "profile", lambda **keys: asked.append(keys) or told.profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append(f"await {device}"))
    _steps(_profiler(_SECTION, 5, device="cuda:1"), range(3, 6), told)
    first, second = (f"await cuda:1 step {step} await cuda:1" for step in (4, 5))
    assert " ".join(told) == f"(3 start next ) (4 {first} next ) (5 {second} write 5 )"
    assert asked[0]["activities"] == [ProfilerActivity.CPU, ProfilerActivity.CUDA]


@pytest.mark.parametrize("traced", [True, False])
def test_memory_is_written_at_each_multiple_of_the_period(
    told: _Told, monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    written: list[tuple[Path, str, int]] = []
    monkeypatch.setattr(profiler, "write_snapshot", lambda *to: written.append(to))
    section = replace(_SECTION, enable_profiling=traced, enable_memory_snapshot=True)
    _steps(_profiler(section, 20), range(1, 16), told, stop_at=15)
    assert written == [(Path("nowhere/memory_snapshot"), step, 0) for step in ("5", "10")], "none where the run stops"


class _Circular:
    """As torch's profiler, whose parts hold each other."""

    def __init__(self) -> None:
        self.itself = self
        self.start = self.step = self.stop = lambda: None


@pytest.mark.parametrize("stop_at", [-1, 4])
def test_what_a_window_has_seen_is_freed(told: _Told, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    kept: list[weakref.ref[Any]] = []

    def profile(**_: Any) -> Any:
        it = _Circular()
        kept.append(weakref.ref(it))
        return it

    monkeypatch.setattr(profiler, "profile", profile)
    gc.disable()  # as training does
    try:
        _steps(_profiler(_SECTION, 5), range(1, 5 if stop_at == 4 else 6), told, stop_at=stop_at)
        assert [each() for each in kept] == [None]
    finally:
        gc.enable()


def test_a_profiler_that_cannot_stop_hides_no_other_error(told: _Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = SimpleNamespace(start=lambda: None, step=lambda: None, stop=stop)
    monkeypatch.setattr(profiler, "profile", lambda **_: broken)
    tried = _profiler(_SECTION, 5)
    tried.begin(3)
    tried.close()
    tried.close()
