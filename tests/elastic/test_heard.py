"""In a save, which has no limit, a rank that is heard of no more ends the wait of the one before it."""

import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from torchtitan_lite.config.running import Comm
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.elastic import watchdog
from torchtitan_lite.elastic.watchdog import Watchdog

_LIMIT_S = 1


def _neighbour(store: dist.Store, does: str) -> None:
    """Rank 1's entry, for three limits."""
    for count in range(15):
        phase = "ended" if does == "ends" else "saving"
        if count == 0 or does == "goes on":
            store.set("start/last/1", json.dumps({"host": "b", "step": 3, "phase": phase, "time": count}))
        time.sleep(_LIMIT_S / 5)


@pytest.mark.parametrize(
    ("does", "paused", "ends"),
    [("is gone", True, True), ("is gone", False, False), ("goes on", True, False), ("ends", True, False)],
)
def test_a_rank_that_waits_hears_of_the_next(does: str, paused: bool, ends: bool, tmp_path: Path) -> None:
    store: Any = dist.HashStore()
    here = Runtime(0, 2, torch.device("cpu"), "CPU")
    dog = Watchdog(Comm(train_timeout_seconds=_LIMIT_S), tmp_path, here, lambda *_, **__: None)
    dog._prefix, dog._paused = "start", paused
    dog.tighten()
    with patch.object(watchdog, "connect", lambda _: store):
        talk = threading.Thread(target=dog._talk)
        talk.start()
        _neighbour(store, does)
        assert dog._wake.is_set() == ends
        dog._closing = True
        dog._hush.set()
        talk.join(10)
    assert json.loads(store.get("start/last/0"))["phase"] == "ended", "it says that it leaves"
