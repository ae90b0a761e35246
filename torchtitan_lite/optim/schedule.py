"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchtitan_lite.config.schema import LRScheduler

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Schedule:
    """Warm-up, stable part, decay; lengths in steps.

    As in TorchTitan, the decay's end lies one step past the last, so that the last step still learns.
    """

    peak: float
    warmup: int
    stable: int
    decay: int
    decay_type: str
    min_factor: float

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, counted from 1."""
        return self.peak * self._factor(step)

    def _factor(self, step: int) -> float:
        if step <= self.warmup:
            return step / self.warmup
        into = step - self.warmup - self.stable - 1
        if into <= 0:
            return 1.0
        shape = _SHAPES[self.decay_type](into / self.decay)
        return self.min_factor + (1.0 - self.min_factor) * shape

    def __str__(self) -> str:
        return f"{self.warmup} warm-up, {self.stable} stable, {self.decay} {self.decay_type} decay"


def build_schedule(config: LRScheduler, peak: float) -> Schedule:
    """The schedule of a resolved config: `total_steps` is known. As in TorchTitan, a warm-up longer than the
    schedule is shortened to it, and a decay to what the warm-up leaves; the log shows the lengths that came out."""
    warmup = min(config.warmup_steps, config.total_steps)
    room = config.total_steps - warmup
    decay = room if config.decay_ratio < 0 else min(room, round(config.total_steps * config.decay_ratio))
    return Schedule(peak, warmup, room - decay, decay, config.decay_type, config.min_lr_factor)
