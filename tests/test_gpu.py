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


@pytest.mark.gpu
@pytest.mark.parametrize("flavor", ["dense", "moe"])
def test_a_step_never_waits_for_the_device(flavor: str) -> None:
    import torch

    from tests.tiny import MOE, SPEC, TINY
    from torchtitan_lite.balance import Balance
    from torchtitan_lite.config.schema import Comm, Debug, Optimizer
    from torchtitan_lite.data.loader import Batch
    from torchtitan_lite.distributed import runtime
    from torchtitan_lite.distributed.context_parallel import SequenceShare
    from torchtitan_lite.models.common.initialize import initialize
    from torchtitan_lite.optim.gradients import clip_by_global_norm
    from torchtitan_lite.optim.optimizer import build_optimizer
    from torchtitan_lite.trainable import Place, WholeModel

    here = runtime.start(Comm(), Debug())
    try:
        spec, args = (SPEC, TINY) if flavor == "dense" else (MOE, MOE.flavors["shared"])
        module = spec.build(args).to(here.device)
        initialize(module, 1, lambda name: spec.initial(name, args))
        balance = None
        if flavor == "moe":
            for parameter in module.parameters():  # the grouped products of float32 wait
                parameter.data = parameter.data.bfloat16()
            names = [f"layers.{index}.feed_forward" for index in range(args.n_layers)]
            balance = Balance([module], names, args.moe.num_experts, 1e-3, here.device)
        place = Place(here.device, 32, SequenceShare("allgather", 0, 1), counts=True, reports=True)
        model = WholeModel(module, place, balance, whole_gradients=False)
        optimizer = build_optimizer(Optimizer(), model.named_parameters())
        rows = torch.randint(args.vocab_size, (2, 33))
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros((2, 32), dtype=torch.int64))
        for mode in ("default", "error"):  # the first step allocates
            torch.cuda.set_sync_debug_mode(mode)
            model.forward_backward([batch])
            clip_by_global_norm(model.parameters(), 1.0, None)
            optimizer.step()
            optimizer.zero_grad()
            if balance is not None:
                balance.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        runtime.stop()
