"""Muon: torch's on one process, the same on every sharding, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import MOE, SPEC, write_recipe
from torchtitan_lite.config.optimizing import Optimizer, ParamGroup
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.optim.groups import require_groups, settings_of
from torchtitan_lite.optim.muon import Muon, orthogonalised
from torchtitan_lite.optim.optimizer import build_optimizer, set_lr
from torchtitan_lite.optim.states import Kept


def _meta(spec: ModelSpec, flavor: str) -> tuple[nn.Module, ExpertPlan | None]:
    with torch.device("meta"):
        return spec.build(spec.flavors[flavor]), spec.plan(spec.flavors[flavor]).experts


def _by_muon(spec: ModelSpec, flavor: str, config: Optimizer) -> set[str]:
    model, experts = _meta(spec, flavor)
    require_groups(model, config, experts)
    named = model.named_parameters()
    return {name for name, p in named if settings_of(name, p.dim(), config, experts).optimizer == "Muon"}


def test_muon_takes_the_blocks_matrices() -> None:
    names = _by_muon(SPEC, "tiny", Optimizer("Muon"))
    assert len(names) == 3 * 7
    assert all(name.startswith("layers.") and "norm" not in name for name in names)
    names = {name.removeprefix("layers.0.") for name in _by_muon(MOE, "shared", Optimizer("Muon"))}
    assert {f"feed_forward.experts.w{n}" for n in (1, 2, 3)} <= names
    assert "feed_forward.shared.w1.weight" in names
    assert not any("router" in name for name in names)


def test_groups_choose_optimizers() -> None:
    without = Optimizer("Muon", param_groups=[ParamGroup("*.attention.*", "AdamW")])
    assert len(_by_muon(SPEC, "tiny", without)) == 3 * 3
    alone = Optimizer(param_groups=[ParamGroup("output.*", "Muon")])
    assert _by_muon(SPEC, "tiny", alone) == {"output.weight"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Optimizer(param_groups=[ParamGroup("norm.*", "Muon")]), r"Muon takes matrices, and norm.weight has 1 dims"),
        (Optimizer("Muon", param_groups=[ParamGroup("*", "AdamW")]), r"matrices of numbered blocks.* finds none"),
        (Optimizer("Muon", param_groups=[ParamGroup("*.wq.*", beta2=0.5)]), r"\[0\].beta2 = 0.5 is AdamW's"),
    ],
)
def test_what_muon_cannot_take_is_refused(config: Optimizer, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _by_muon(SPEC, "tiny", config)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_steps_are_those_of_torchs_muon_and_adamw(monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    # torch's iteration is in bfloat16 on every device.
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    model, twin = SPEC.build(SPEC.flavors["tiny"]), SPEC.build(SPEC.flavors["tiny"])
    generator = torch.Generator().manual_seed(1)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.data.normal_(generator=generator)
        other.data.copy_(parameter)
    config = Optimizer("Muon", lr=0.02, momentum=0.9, adjust_lr_fn=scale)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, model.named_parameters())
    named = dict(twin.named_parameters())
    matrices = [p for name, p in named.items() if "layers" in name and p.dim() == 2]
    norms = [p for name, p in named.items() if "norm" in name]
    rest = [p for name, p in named.items() if "layers" not in name and "norm" not in name]
    decays = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
    theirs = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn=scale),
        torch.optim.AdamW(decays, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]
    set_lr(optimizer, 0.02)
    for _ in range(3):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        for each in (optimizer, *theirs):
            each.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=1e-5, atol=1e-6), name


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0)), 5))
    assert values.min() > 0.6
    assert values.max() < 1.3


# Shape of a parameter, of its mesh, and the dim that each axis of the mesh splits (None: copies).
SHARDINGS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]] = [
    ((12, 8), (4,), (0,)),
    ((8, 12), (4,), (0,)),
    ((5, 7), (4,), (0,)),  # of which a rank has no row
    ((8, 12), (2, 2), (0, 1)),
    ((12, 8), (2, 2), (0, 0)),
    ((6, 9), (2, 2), (None, 0)),
    ((6, 9), (4,), (None,)),
    ((2, 6, 9), (2, 2), (None, 1)),
    ((2, 6, 9), (2, 2), (None, 0)),
    ((4, 6, 9), (4,), (0,)),
    ((6, 6, 9), (4,), (0,)),
    ((2, 6, 9), (2, 2), (1, 0)),
    ((3, 6, 9), (4,), (1,)),
]


def _stepped(shape: tuple[int, ...], spread: Any = lambda tensor: tensor) -> Tensor:
    """A few of one shape, after two steps; spread: over ranks."""
    generator = torch.Generator().manual_seed(4)
    parameters = [nn.Parameter(spread(torch.randn(shape, generator=generator))) for _ in range(5)]
    optimizer = Muon(
        [{"params": parameters, "weight_decay": 0.1}],
        lr=0.1,
        momentum=0.9,
        ns_steps=5,
        adjust_lr_fn="original",
        kept=Kept(torch.float32),
    )
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = spread(torch.randn(shape, generator=generator))
        optimizer.step()
    return torch.stack([getattr(each.detach(), "full_tensor", each.detach)() for each in parameters])


def _sharded() -> list[Tensor]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    found = []
    for shape, ranks, dims in SHARDINGS:
        mesh = init_device_mesh("cpu", ranks)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        found.append(
            _stepped(shape, lambda whole: distribute_tensor(whole, mesh, placements, src_data_rank=None))  # noqa: B023
        )
    dist.barrier()
    return found


@pytest.mark.ranks(4)
def test_a_sharded_matrix_is_orthogonalised_as_a_whole(pool: RankPool) -> None:
    whole = [_stepped(shape) for shape, *_ in SHARDINGS]
    for found in pool.run(_sharded, 4):
        for case, mine, right in zip(SHARDINGS, found, whole, strict=True):
            assert torch.allclose(mine, right, atol=1e-6), case


_TP, _PP, _EP = (f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "pipeline", "expert"))
MESHES = {
    "SPEC": [(4, (_TP,)), (2, (_PP,)), (2, ())],
    "MOE": [(4, (_TP, _EP))],
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("model", "flavor"), [("SPEC", "tiny"), ("MOE", "shared")])
def test_runs_by_muon_are_the_same_on_every_mesh_and_go_on_on_another(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, model: str, flavor: str
) -> None:
    recipe = write_recipe(
        tmp_path / "muon.toml",
        corpus,
        cache,
        model={"spec": f"tests.tiny:{model}", "flavor": flavor},
        optimizer={"name": "Muon"},
        checkpoint={"enable": True, "interval": 4},
    )
    one = [line["loss"] for line in _run(pool, 1, recipe, tmp_path / "one", "--training.steps=6")]
    assert one[-1] < one[0] - 0.5
    for ranks, mesh in MESHES[model]:
        folder = tmp_path / f"{ranks}{mesh}"
        losses = [line["loss"] for line in _run(pool, ranks, recipe, folder, *mesh, "--training.steps=4")]
        assert losses == pytest.approx(one[:4], rel=1e-5), mesh
    losses = [line["loss"] for line in _run(pool, 1, recipe, folder, "--training.steps=6")]
    assert losses == pytest.approx(one, rel=1e-5)
