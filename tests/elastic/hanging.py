"""A rank that hangs, under torchrun: `torchrun ... tests/elastic/hanging.py WAYS RECIPE [overrides]`.

WAYS: how the last rank hangs in its third step, one for each start that torchrun makes, separated by commas; a start
without one trains to the end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from torchtitan_lite import train, trainer
from torchtitan_lite.data.loader import TrainLoader
from torchtitan_lite.trainable import WholeModel


def _sleep() -> None:
    time.sleep(60)


def _stop() -> None:
    # torchrun would be half a minute before it kills a rank that takes no signal.
    subprocess.Popen(["sh", "-c", f"sleep 6; kill -KILL {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _suspended() -> None:
    """Stopped as a whole and going on, as by a scheduler; then a hang."""
    time.sleep(1.2)  # the watchdog has looked at it
    subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.7)
    print("went on", flush=True)
    time.sleep(60)


WAYS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "loader": (TrainLoader, "next_step", _sleep),
    "suspended": (TrainLoader, "next_step", _suspended),
    "stopped": (WholeModel, "forward_backward", _stop),
    "parted": (trainer, "clip_by_global_norm", lambda: dist.barrier()),
}


def _hang(way: str) -> None:
    owner, name, hang = WAYS[way]
    usual, calls = getattr(owner, name), iter(range(1, 10_000))

    def hanging(*args: Any) -> Any:
        if next(calls) == 3 and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            hang()
        return usual(*args)

    setattr(owner, name, hanging)


if __name__ == "__main__":
    ways, start = sys.argv[1].split(","), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if start < len(ways):
        _hang(ways[start])
    sys.exit(train.main(sys.argv[2:]))
