"""What expert parallelism sends, when, and where it leaves the experts' weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.test_communication import _counted
from tests.ranks import RankPool
from tests.tiny import MOE, write_recipe
from torchtitan_lite.distributed.collectives import finish_rows, start_rows
from torchtitan_lite.distributed.expert_parallel import apply_expert_parallel
from torchtitan_lite.distributed.mesh import build_mesh, expert_axes
from torchtitan_lite.distributed.parallel_dims import ParallelDims
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.common.moe import MoE
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.spec import Init

B, L, D, F, E, K = 2, 12, 16, 24, 4, 2
MODEL = ["--model.spec=tests.tiny:MOE", "--model.flavor=routed"]


class _Calls(TorchDispatchMode):
    """In their order: rows that set out and rows waited for, products of experts, other products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.rows: list[int] = []
        self._flying: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "all_to_all_single" and out.shape[-1] == D:
            self.names.append("start")
            self.rows.append(len(args[0]))
            self._flying.add(out.untyped_storage().data_ptr())
        elif name == "wait_tensor" and args[0].untyped_storage().data_ptr() in self._flying:
            self.names.append("wait")
            self._flying.discard(args[0].untyped_storage().data_ptr())
        elif name in ("_grouped_mm", "mm"):
            self.names.append("experts" if name == "_grouped_mm" else "product")
        return out


def _short(names: list[str]) -> str:
    """Runs of the same name as one."""
    return " ".join(name for index, name in enumerate(names) if index == 0 or names[index - 1] != name)


def _layer(shared: int, halves: bool) -> nn.ModuleDict:
    mesh = build_mesh(ParallelDims(1, 2, ep=2), "cpu")
    with torch.device("meta"):
        model = nn.ModuleDict({"moe": MoE(D, F, MoEShape(E, K, shared))})
    ep = expert_axes(mesh, 2)[1]
    assert ep is not None
    apply_expert_parallel(model, ep, ExpertPlan("moe", E, K), halves=halves)
    model.to_empty(device="cpu")
    initialize(model, 1, lambda name: Init(std=0.3))
    return model


def _order_of_work(shared: int, halves: bool) -> tuple[str, str, list[int]]:
    model = _layer(shared, halves)
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(dist.get_rank()), requires_grad=True)
    with _Calls() as forward:
        out = model["moe"](x)
    with _Calls() as backward:
        out.sum().backward()
    # The router's own product comes first, and last.
    return _short(forward.names[1:]), _short(backward.names), forward.rows


def test_rows_travel_while_the_shared_expert_computes(pool: RankPool) -> None:
    for forward, backward, _ in pool.run(_order_of_work, 2, 1, False):
        assert forward == "start product wait experts start wait"
        assert backward.startswith("start wait experts start product wait")


def test_rows_of_one_half_travel_while_the_other_computes(pool: RankPool) -> None:
    for forward, backward, _ in pool.run(_order_of_work, 2, 0, True):
        # The second half is under way while the first computes, then what the first gave while the second computes.
        assert forward == "start wait experts start wait experts start wait"
        assert backward.startswith("start wait experts start wait experts start wait")


def test_every_choice_is_sent_once_and_nothing_else(pool: RankPool) -> None:
    for halves in (False, True):
        rows = [rows for _, _, rows in pool.run(_order_of_work, 2, 0, halves)]
        parts = 2 if halves else 1
        for own in rows:
            assert sum(own[:parts]) == B * L * K  # there
        assert sum(sum(own[parts:]) for own in rows) == 2 * B * L * K  # and back


def _travelled(rows: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows [from rank][to rank]: what arrives, and the gradient that comes back."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    send, receive = rows[rank], [row[rank] for row in rows]
    x = (100.0 * rank + torch.arange(float(sum(send)))[:, None]).expand(-1, D).clone().requires_grad_()
    out = finish_rows(start_rows(x, send, receive, group))
    out.backward(2 * out.detach())
    assert x.grad is not None
    return [(x.detach(), out.detach(), x.grad)]


@pytest.mark.parametrize("rows", [[[1, 2], [3, 0]], [[0, 0], [0, 4]], [[0, 0], [0, 0]]], ids=str)
def test_uneven_rows_arrive_in_order_and_so_do_their_gradients(pool: RankPool, rows: list[list[int]]) -> None:
    found = [part[0] for part in pool.run(_travelled, 2, rows)]
    for rank, (x, out, grad) in enumerate(found):
        arrived = [found[source][0].split(rows[source])[rank] for source in range(2)]
        assert torch.equal(out, torch.cat(arrived))
        assert torch.equal(grad, 2 * x)


def _one_rank_gets_all(one_rank: int) -> tuple[bool, bool]:
    """Every token goes to the experts of one rank; the other has none and takes part all the same."""
    model = _layer(0, halves=False)
    model["moe"].expert_bias[(1 - one_rank) * 2 : (2 - one_rank) * 2] = -100.0
    out = model["moe"](torch.randn(B, L, D))
    out.sum().backward()
    grad = model["moe"].experts.w1.grad.to_local()
    return bool(grad.any()), bool(out.isfinite().all())


def test_a_rank_without_tokens_has_gradients_of_zero(pool: RankPool) -> None:
    assert pool.run(_one_rank_gets_all, 2, 0) == [(True, True), (False, True)]
    assert pool.run(_one_rank_gets_all, 2, 1) == [(False, True), (True, True)]


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> str:
    return str(write_recipe(tmp_path / "deep.toml", corpus, cache))


def _degrees(**degrees: int) -> list[str]:
    return [*MODEL, *(f"--parallelism.{name}_parallel_degree={degree}" for name, degree in degrees.items())]


def test_tensor_parallelism_gathers_hidden_states_for_attention_alone(pool: RankPool, recipe: str) -> None:
    blocks = MOE.flavors["routed"].n_layers
    for _, shapes in pool.run(_counted, 2, recipe, _degrees(tensor=2), 1):
        states = [kind for kind, shape in shapes if len(shape) == 3 and shape[-1] == 64]
        # A block: one each way; the embedding scatters and the output gathers.
        assert states.count("all_gather") == 2 * blocks + 2
        assert states.count("reduce_scatter") == 2 * blocks + 2


def _held(recipe: str, arguments: list[str]) -> tuple[list[int], int, list[str]]:
    """Shape of the first layer's w1 on this rank, elements of all parameters, placements."""
    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.preflight import plan_job

    plan = plan_job(recipe, arguments, dist.get_world_size())
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), dist.get_rank())
    parameters: dict[str, Any] = dict(model.named_parameters())
    w1 = parameters["layers.0.feed_forward.experts.w1"]
    total = sum(parameter.to_local().numel() for parameter in parameters.values())
    return list(w1.to_local().shape), total, list(w1.device_mesh.mesh_dim_names)


def _router_under_bfloat16(recipe: str, arguments: list[str]) -> bool:
    """Whether the router computes from weights that were never rounded, in float32."""
    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.data.loader import Batch
    from torchtitan_lite.distributed.expert_parallel import local
    from torchtitan_lite.models.common.moe import Router
    from torchtitan_lite.preflight import plan_job

    plan = plan_job(recipe, [*arguments, "--training.mixed_precision_param=bfloat16"], dist.get_world_size())
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), dist.get_rank())
    expected: list[Tensor] = []
    exact: list[bool] = []

    def before(module: Any, args: Any) -> None:  # when the weights are gathered
        (x,), weight = args, local(module.weight)
        assert x.dtype == torch.bfloat16
        assert (weight.bfloat16().float() != weight).any()
        expected.append(x.float() @ weight.t())

    def after(module: Any, args: Any, out: Tensor) -> None:
        exact.append(out.dtype == torch.float32 and torch.allclose(out, expected[-1], rtol=1e-5, atol=1e-6))

    for module in model.parts[0].modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    tokens = torch.randint(MOE.flavors["routed"].vocab_size, (2, 32))
    model.forward_backward([Batch(tokens, tokens)])
    return len(exact) == MOE.flavors["routed"].n_layers and all(exact)


@pytest.mark.parametrize("degrees", [{"expert": 2}, {"tensor": 2}], ids=str)
def test_the_router_is_in_float32_where_all_else_is_not(pool: RankPool, recipe: str, degrees: dict[str, int]) -> None:
    assert pool.run(_router_under_bfloat16, 2, recipe, _degrees(**degrees)) == [True, True]


@pytest.mark.parametrize(
    ("ranks", "degrees", "shape", "axes"),
    [
        (2, {}, [4, 48, 64], ["dp_shard"]),
        (3, {}, [8, 16, 64], ["dp_shard"]),  # three ranks do not divide 8 experts: rows of each
        (2, {"expert": 2}, [4, 48, 64], ["efsdp", "ep"]),
        (4, {"expert": 2}, [2, 48, 64], ["efsdp", "ep"]),
        (4, {"tensor": 2}, [2, 48, 64], ["dp_shard_cp_tp"]),
        (4, {"tensor": 2, "expert": 2}, [2, 48, 64], ["efsdp", "ep"]),
        (4, {"context": 2, "expert": 4}, [2, 48, 64], ["efsdp", "ep"]),
        pytest.param(6, {"expert": 2}, [4, 16, 64], ["efsdp", "ep"], marks=pytest.mark.ranks(6)),
    ],
)
def test_every_rank_holds_its_part_of_the_experts_and_no_more(
    pool: RankPool, recipe: str, ranks: int, degrees: dict[str, int], shape: list[int], axes: list[str]
) -> None:
    sequence = ["--training.seq_len=48", "--training.global_batch_size=12"]
    found = pool.run(_held, ranks, recipe, _degrees(**degrees) + sequence)
    assert [(part[0], part[2]) for part in found] == [(shape, axes)] * ranks
    copies = degrees.get("tensor", 1)  # norms and routers are whole on each
    whole = MOE.flavors["routed"].parameter_count()
    assert whole <= sum(part[1] for part in found) <= whole + copies * 8 * 64 * 8
