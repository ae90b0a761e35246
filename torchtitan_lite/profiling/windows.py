"""Which steps are traced: the last ones before each multiple of the period."""

from dataclasses import dataclass

from torchtitan_lite.config.schema import Profiling


@dataclass(frozen=True)
class Window:
    """Steps: from `first` the profiler warms up, from `active` to `last` it keeps what it sees."""

    first: int
    active: int
    last: int


def window_at(section: Profiling, step: int, steps: int) -> Window | None:
    """The window that `step` is in; None between windows, and where the run ends at `steps` before the window does."""
    last = -(-step // section.profile_freq) * section.profile_freq
    active = last - section.profiler_active + 1
    first = active - section.profiler_warmup
    return Window(first, active, last) if first <= step and last <= steps else None
