"""When a checkpoint is due."""

import time

import pytest

from torchtitan_lite.checkpoint.cadence import Cadence


def test_by_steps() -> None:
    cadence = Cadence(5, -1)
    assert [step for step in range(1, 21) if cadence.due(step)] == [5, 10, 15, 20]
    assert not cadence.by_clock()


def test_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cadence = Cadence(5, 1.5)
    now = 1089.0
    assert not cadence.by_clock()
    now = 1090.0
    assert cadence.by_clock()
    cadence.began()
    assert not cadence.by_clock()
    now = 1180.0
    assert cadence.by_clock()


def test_after_a_failure_it_is_tried_sooner_then_ever_later_up_to_the_interval() -> None:
    cadence = Cadence(6, -1)
    assert [cadence.failed(step) for step in (6, 7, 9, 13, 19)] == [7, 9, 13, 19, 25]
    assert [step for step in range(19, 31) if cadence.due(step)] == [24, 25, 30]
    cadence.succeeded()
    assert cadence.failed(30) == 31
