"""States in bfloat16 and int8: how they are rounded, how far that takes a run, and the same on every mesh."""

import math
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.config.optimizing import Optimizer
from torchtitan_lite.elastic.faults import step_unless
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.optim import adamw
from torchtitan_lite.optim.optimizer import build_optimizer, new_state, set_lr

RATE = 0.01
NARROW: list[Any] = ["bfloat16", "int8"]


def _parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{n}": nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in enumerate(shapes)}


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        scale = torch.rand(parameter.shape, generator=generator) ** 4
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    set_lr(optimizer, RATE)
    optimizer.step()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_steps_in_bfloat16_are_float32s_with_moments_rounded_in_between(
    monkeypatch: pytest.MonkeyPatch, implementation: Any
) -> None:
    monkeypatch.setattr(adamw, "_AT_ONCE", 100)  # some rows of a matrix at a time, several vectors
    shapes = ((40, 16), (7,), (3, 5, 8), (1, 300), (5,))
    mine, theirs = _parameters(*shapes), _parameters(*shapes)
    optimizer = build_optimizer(Optimizer(state_dtype="bfloat16", implementation=implementation), mine.items())
    exact = build_optimizer(Optimizer(implementation=implementation), theirs.items())
    for step in range(4):
        _step(optimizer, mine, step)
        _step(exact, theirs, step)
        for state in exact.state.values():
            for key in adamw.MOMENTS:
                state[key].copy_(state[key].bfloat16())
    for name, parameter in mine.items():
        assert torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-7), name
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"].float(), exact.state[theirs[name]]["exp_avg_sq"])


def test_steps_in_int8_are_torchaos_where_blocks_lie_alike() -> None:
    from torchao.optim import AdamW8bit

    mine, theirs = _parameters((64, 256), (512,)), _parameters((64, 256), (512,))
    optimizer = build_optimizer(Optimizer(state_dtype="int8"), mine.items())
    other = AdamW8bit(theirs.values(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torch.compiler.set_stance("force_eager")
    try:
        for step in range(4):
            _step(optimizer, mine, step)
            for parameter, one in zip(theirs.values(), mine.values(), strict=True):
                parameter.grad = one.grad
            other.step()
    finally:
        torch.compiler.set_stance("default")
    for name, parameter in mine.items():
        # A number half-way between two codes goes the other way here and there.
        assert (parameter - theirs[name]).abs().max() < 0.02 * RATE, name
    for key in adamw.MOMENTS:
        state = optimizer.state[mine["w0"]]
        codes, right = state[key], other.state[theirs["w0"]][key]
        assert (codes != right.codes).float().mean() < 1e-3
        assert torch.allclose(state[f"{key}_scale"].flatten(), right.scale, rtol=1e-5)


def test_memory_of_the_states() -> None:
    with torch.device("meta"):
        model = LLAMA3.build(LLAMA3.flavors["8B"])
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    for name in ("AdamW", "Muon"):
        kept = 2 * numbers if name == "AdamW" else 2 * numbers - in_blocks
        # Of int8 a scale for 256 numbers, and norms in float32.
        for dtype, bytes_each in {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}.items():
            optimizer = build_optimizer(Optimizer(name, state_dtype=dtype), model.named_parameters())  # type: ignore[arg-type]
            states = [new_state(optimizer, parameter) for parameter in model.parameters()]
            found = sum(value.nbytes for state in states for value in state.values() if value.dim())
            assert found == pytest.approx(bytes_each * kept, rel=1e-3 if dtype == "int8" else 0), (name, dtype)


@pytest.mark.parametrize(
    "config", [Optimizer("Muon"), *(Optimizer(state_dtype=dtype) for dtype in NARROW)], ids=["Muon", *NARROW]
)
def test_a_skipped_step_changes_no_bit(config: Optimizer) -> None:
    parameters = {f"layers.0.{name}": each for name, each in _parameters((64, 64), (64,)).items()}
    optimizer = build_optimizer(config, parameters.items())
    _step(optimizer, parameters, 1)

    def bits() -> list[Tensor]:
        states = [value for each in parameters.values() for value in optimizer.state[each].values()]
        return [each.detach().clone() for each in (*parameters.values(), *states)]

    before = bits()
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    step_unless(torch.ones(()), optimizer)
    assert all(map(torch.equal, bits(), before))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    step_unless(torch.zeros(()), optimizer)
    assert not any(map(torch.equal, bits(), before))


# Shape of a parameter, of its mesh, and the dim that each axis splits.
SHARDINGS = [
    ((64, 256), (4,), (0,)),
    ((65, 128), (4,), (0,)),
    ((64, 512), (2, 2), (0, 1)),
    ((8, 16, 64), (4,), (0,)),
    ((3, 32, 64), (4,), (1,)),
]


def _stepped(dtype: Any, shape: tuple[int, ...], spread: Any = lambda tensor: tensor) -> list[Tensor]:
    """The parameter after two steps, and its state."""
    whole = _parameters(shape)["w0"].detach()
    parameter = nn.Parameter(spread(whole))
    optimizer = build_optimizer(Optimizer(state_dtype=dtype), [("w0", parameter)])
    for step in range(2):
        set_lr(optimizer, RATE)
        parameter.grad = spread(torch.randn(shape, generator=torch.Generator().manual_seed(step)))
        optimizer.step()
    tensors = [parameter.detach(), *(value for value in optimizer.state[parameter].values() if value.dim())]
    return [getattr(tensor, "full_tensor", tensor.detach)() for tensor in tensors]


def _sharded() -> list[list[Tensor]]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    def spread(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    found = []
    for shape, ranks, dims in SHARDINGS:
        mesh, placements = init_device_mesh("cpu", ranks), [Shard(dim) for dim in dims]
        found += [_stepped(dtype, shape, spread) for dtype in NARROW]
    mesh, placements = init_device_mesh("cpu", (4,)), [Shard(1)]
    with pytest.raises(UserError, match='"int8": a rank has 64 of the 256 columns of w0, and a block of 256 has one'):
        _stepped("int8", (64, 256), spread)
    return found


@pytest.mark.ranks(4)
def test_sharded_states_are_those_of_the_whole(pool: RankPool) -> None:
    whole = [_stepped(dtype, shape) for shape, *_ in SHARDINGS for dtype in NARROW]
    assert {tensor.dtype for tensor in whole[1]} == {torch.float32, torch.uint8}
    for found in pool.run(_sharded, 4):
        for mine, right in zip(found, whole, strict=True):
            assert all(map(torch.equal, mine, right))


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "states.toml", corpus, cache, checkpoint={"enable": True, "interval": 2})


@pytest.mark.ranks(2)
def test_states_are_saved_and_go_on_on_another_mesh(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    settings = ("--optimizer.name=Muon", "--optimizer.state_dtype=int8")
    one = [line["loss"] for line in _run(pool, 1, recipe, tmp_path / "one", *settings, "--training.steps=4")]
    whole = [line["loss"] for line in _run(pool, 2, recipe, tmp_path / "two", *settings, "--training.steps=4")]
    # A difference in the last bit rounds to another number here and there.
    assert whole == pytest.approx(one, rel=2e-5)
    _run(pool, 2, recipe, tmp_path / "parts", *settings, "--training.steps=2")
    copytree(tmp_path / "parts", tmp_path / "moved")
    parts = _run(pool, 2, recipe, tmp_path / "parts", *settings, "--training.steps=4")
    assert [line["loss"] for line in parts] == whole
    moved = _run(pool, 1, recipe, tmp_path / "moved", *settings, "--training.steps=4")
    assert [line["loss"] for line in moved] == pytest.approx(whole, rel=2e-5)


@pytest.mark.parametrize(("name", "narrow"), [("AdamW", NARROW), ("Muon", ["int8"])])
def test_runs_end_near_those_with_states_in_float32(
    pool: RankPool, recipe: Path, tmp_path: Path, name: str, narrow: list[str]
) -> None:
    settings = ("--training.steps=100", "--lr_scheduler.total_steps=100", "--checkpoint.enable=false")
    ends = {}
    for dtype in ("float32", *narrow):
        chosen = (f"--optimizer.name={name}", f"--optimizer.state_dtype={dtype}")
        lines = _run(pool, 1, recipe, tmp_path / dtype, *chosen, *settings)
        ends[dtype] = sum(line["loss"] for line in lines[-10:]) / 10
    for dtype in narrow:
        assert 0 < abs(ends[dtype] / ends["float32"] - 1) < 0.01, ends
