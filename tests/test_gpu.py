"""What only an accelerator can show."""

from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.test_trainer import _run
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
