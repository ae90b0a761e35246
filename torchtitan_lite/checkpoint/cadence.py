"""When a checkpoint is due: by steps, by minutes, and again soon after one that could not be written."""

import time


class Cadence:
    """interval: steps between checkpoints. minutes: at most between them; -1 for no such limit."""

    def __init__(self, interval: int, minutes: float) -> None:
        self._interval, self._minutes = interval, minutes
        self._last, self._failures, self._retry_at = time.monotonic(), 0, -1

    def by_clock(self) -> bool:
        return self._minutes != -1 and time.monotonic() - self._last >= 60 * self._minutes

    def due(self, step: int) -> bool:
        return step % self._interval == 0 or step == self._retry_at

    def began(self) -> None:
        self._last = time.monotonic()

    def succeeded(self) -> None:
        self._failures, self._retry_at = 0, -1

    def failed(self, step: int) -> int:
        """Try again after the next step, then after 2, 4, ... more: a full disk costs a write each time."""
        self._retry_at = step + min(2**self._failures, self._interval)
        self._failures += 1
        return self._retry_at
