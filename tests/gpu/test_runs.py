"""Whole runs on an accelerator: the numbers of a CPU, and a host that does not wait."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from tests.test_trainer import _run, _train
from tests.tiny import write_recipe


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_losses_on_a_gpu_are_those_of_the_cpu(
    pool: RankPool,
    tmp_path: Path,
    corpus: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    tolerance: float,
) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", corpus, cache, checkpoint={"enable": True, "interval": 5})
    gpu = _run(pool, 1, recipe, tmp_path / "gpu", f"--training.mixed_precision_param={precision}")
    hidden = RankPool(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu = _run(hidden, 1, recipe, tmp_path / "cpu")
    hidden.close()
    assert [line["loss"] for line in gpu] == pytest.approx([line["loss"] for line in cpu], rel=tolerance)


def _watched(recipe: str, folder: str, *overrides: str) -> tuple[list[str], bool]:
    """What waited for the device from the third step on, until the last step's numbers are shown; whether torch's
    allocator grows its segments."""
    from torchtitan_lite.trainer import Trainer

    step, report = Trainer.step, Trainer._report

    def watched(self, batches):  # type: ignore[no-untyped-def]
        if self.progress.step == 2:  # before, what is allocated and compiled once
            torch.cuda.set_sync_debug_mode("warn")
        return step(self, batches)

    def unwatched(self, *shown):  # type: ignore[no-untyped-def]
        torch.cuda.set_sync_debug_mode("default")
        report(self, *shown)

    Trainer.step, Trainer._report = watched, unwatched  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps = ("--training.steps=8", "--metrics.log_freq=100")
            assert _train(recipe, f"--job.dump_folder={folder}", *steps, *overrides) == 0
    finally:
        Trainer.step, Trainer._report = step, report  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{each.filename}:{each.lineno}: {each.message}" for each in caught if "synchroniz" in str(each.message)]
    return waits, all(segment["is_expandable"] for segment in torch.cuda.memory._snapshot()["segments"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--training.local_batch_size=2", "--training.loss_chunks=4"),
        ("--faults.skip_nonfinite=false", "--activation_checkpoint.mode=full"),
        ("--model.spec=tests.tiny:MOE", "--model.flavor=shared"),
    ],
    ids=["plain", "accumulated", "checkpointed", "mixture"],
)
def test_a_step_that_is_not_logged_never_waits_for_the_device(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, overrides: tuple[str, ...]
) -> None:
    if any("MOE" in each for each in overrides) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped products wait for the device before Hopper")
    recipe = write_recipe(tmp_path / "tiny.toml", corpus, cache, training={"mixed_precision_param": "bfloat16"})
    ((waits, grows),) = pool.run(_watched, 1, str(recipe), str(tmp_path / "run"), *overrides, group=False)
    assert waits == []
    assert grows
