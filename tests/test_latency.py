"""What keeps the host ahead of the device, as far as a machine without one can show it."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import RankPool
from tests.test_trainer import _train
from tests.tiny import write_recipe
from torchtitan_lite.distributed.context_parallel import SequenceShare
from torchtitan_lite.distributed.environment import ALLOCATOR_VARIABLES, set_allocator
from torchtitan_lite.trainable import Place, WholeModel


@pytest.mark.parametrize("given", [None, *ALLOCATOR_VARIABLES])
def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    environment = {} if given is None else {given: "max_split_size_mb:128"}
    monkeypatch.setattr("os.environ", environment)
    set_allocator()
    assert environment == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if given is None else {given: "max_split_size_mb:128"}
    )


def test_batches_go_to_a_device_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = torch.device("meta"), []
    to = Tensor.to
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)

    def recorded(self: Tensor, *args: Any, **named: Any) -> Tensor:
        calls.append((args, named))
        return to(self, *args, **named)

    monkeypatch.setattr(Tensor, "to", recorded)
    place = Place(device, 8, SequenceShare("allgather", 0, 1), False, lambda a, b: a, counts=True, reports=True)
    model = WholeModel(nn.Identity(), place, None, whole_gradients=False)
    calls.clear()
    assert model.part_of(torch.zeros((2, 8), dtype=torch.int64)).device == device
    assert calls == ["pinned", ((device,), {"non_blocking": True})]


def _collections(recipe: str, folder: str) -> list[tuple[bool, int]]:
    """(whether the collector was on, the generation) of each collection that the trainer asked for."""
    asked, collect = [], gc.collect

    def recorded(generation: int = 2) -> int:
        asked.append((gc.isenabled(), generation))
        return collect(generation)

    gc.collect = recorded
    try:
        assert _train(recipe, f"--job.dump_folder={folder}", "--training.steps=7", "--training.gc_freq=3") == 0
    finally:
        gc.collect = collect
    return [each for each in asked if each[1] == 1]


def test_garbage_is_collected_at_the_same_steps_everywhere_and_at_no_other(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path
) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", corpus, cache)
    assert pool.run(_collections, 1, str(recipe), str(tmp_path / "run"), group=False) == [[(False, 1)] * 2]
