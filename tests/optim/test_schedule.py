"""Learning rates by hand, and against the formula of each decay."""

import math
from collections.abc import Callable

import pytest

from torchtitan_lite.config.schema import LRScheduler
from torchtitan_lite.optim.schedule import Schedule, build_schedule

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def _rates(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.lr(step) for step in range(1, steps + 1)]


def test_warm_up_and_linear_decay_by_hand() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=3, total_steps=8), peak=1.0)
    assert _rates(schedule, 8) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_warm_up_stable_and_decay_by_hand() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=1, total_steps=8, decay_ratio=0.5), peak=2.0)
    assert (schedule.warmup, schedule.stable, schedule.decay) == (1, 3, 4)
    assert _rates(schedule, 8) == pytest.approx([2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=0, total_steps=4), peak=1.0)
    assert _rates(schedule, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_single_step_has_the_peak() -> None:
    assert build_schedule(LRScheduler(warmup_steps=0, total_steps=1), peak=3e-4).lr(1) == 3e-4


@pytest.mark.parametrize("decay_type", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_decays_follow_their_formulas(decay_type: str, floor: float) -> None:
    warmup, decay, total, peak = 10, 40, 100, 3e-4
    config = LRScheduler(
        warmup_steps=warmup,
        total_steps=total,
        decay_ratio=decay / total,
        decay_type=decay_type,  # type: ignore[arg-type]
        min_lr_factor=floor,
    )
    schedule = build_schedule(config, peak)
    for step in range(warmup + 1, total - decay + 2):
        assert schedule.lr(step) == peak
    for into in range(1, decay):
        expected = peak * (floor + (1 - floor) * SHAPES[decay_type](into / decay))
        assert schedule.lr(total - decay + 1 + into) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay_type", SHAPES)
def test_the_decay_ends_one_step_past_the_last(decay_type: str) -> None:
    config = LRScheduler(
        warmup_steps=5,
        total_steps=50,
        decay_type=decay_type,  # type: ignore[arg-type]
        min_lr_factor=0.2,
    )
    schedule = build_schedule(config, peak=1.0)
    assert schedule.lr(50) > 0.2
    assert schedule.lr(51) == pytest.approx(0.2)
    assert build_schedule(LRScheduler(warmup_steps=5, total_steps=50), peak=1.0).lr(50) == pytest.approx(1 / 45)


@pytest.mark.parametrize("decay_type", SHAPES)
def test_rates_rise_to_the_peak_once_and_fall_from_it(decay_type: str) -> None:
    config = LRScheduler(warmup_steps=20, total_steps=100, decay_ratio=0.3, decay_type=decay_type)  # type: ignore[arg-type]
    rates = _rates(build_schedule(config, peak=1.0), 100)
    top = rates.index(max(rates))
    assert rates[top] == 1.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0.0


def test_a_warm_up_longer_than_the_run_rises_all_the_way() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=200, total_steps=10), peak=1.0)
    assert (schedule.stable, schedule.decay) == (0, 0)
    rates = _rates(schedule, 10)
    assert rates == pytest.approx([step * rates[0] for step in range(1, 11)])
    assert 0.0 < rates[0] < rates[-1] <= 1.0


def test_a_warm_up_as_long_as_the_run_leaves_no_decay() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=10, total_steps=10, decay_ratio=0.5), peak=1.0)
    assert (schedule.warmup, schedule.stable, schedule.decay) == (10, 0, 0)
    assert schedule.lr(11) == 1.0


def test_a_decay_without_room_is_shortened_to_what_the_warm_up_leaves() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=6, total_steps=10, decay_ratio=0.8), peak=1.0)
    assert (schedule.warmup, schedule.stable, schedule.decay) == (6, 0, 4)
    assert _rates(schedule, 10)[6:] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_no_decay_stays_at_the_peak() -> None:
    schedule = build_schedule(LRScheduler(warmup_steps=2, total_steps=10, decay_ratio=0.0), peak=0.5)
    assert (schedule.stable, schedule.decay) == (8, 0)
    assert _rates(schedule, 10)[2:] == [0.5] * 8


def test_a_run_shorter_than_its_schedule_sees_the_same_rates() -> None:
    config = LRScheduler(warmup_steps=5, total_steps=100)
    assert _rates(build_schedule(config, 1.0), 20) == _rates(build_schedule(config, 1.0), 100)[:20]


def test_a_schedule_names_its_lengths() -> None:
    config = LRScheduler(warmup_steps=5, total_steps=100, decay_ratio=0.2, decay_type="cosine")
    assert str(build_schedule(config, 1.0)) == "5 warm-up, 75 stable, 20 cosine decay"
