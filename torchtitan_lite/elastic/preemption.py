"""Signals that ask a run to stop: noted when they come, acted upon at the end of a step by all ranks together."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# One Ctrl-C can reach a rank twice: from the terminal, and from torchrun, which passes it on.
_SAME_CTRL_C_S = 1.0
# torchrun starts ranks anew that end with any code but 0.
RESTART = 75
# Agents look for nodes that wait to join ten times a second; each then stops its own ranks.
AGENTS_NOTICE_S = 5.0


class StopSignals:
    """The first signal that asked this rank to stop, in `received` (0: none).

    From `hold` on a signal waits for the end of a step. A second SIGINT ends the rank at once, and so does the end of
    the grace time, in seconds, that the first signal starts.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self.received = 0

    def hold(self, *numbers: int) -> None:
        # Only the main thread may set handlers.
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Give signals their usual effect again, and all time: no save could follow any more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._since > _SAME_CTRL_C_S:
                os._exit(128 + number)
            return
        self.received, self._since = number, time.monotonic()
        self._timer = threading.Timer(self._grace_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        print(
            f"error: no step was saved within the {self._grace_s:g} s after {signal.Signals(self.received).name} "
            "(elastic.grace_seconds); leaving: the next start resumes from the checkpoint before",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.received)


def may_restart() -> bool:
    """Whether torchrun starts ranks anew: then the others can go on without one that has to leave."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
