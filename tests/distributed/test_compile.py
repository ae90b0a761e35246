"""Compilation: a graph for each kind of block, no breaks, and nothing compiled again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.ranks import RankPool
from tests.tiny import DEEP_LLAMA, MOE, write_recipe
from torchtitan_lite.config.techniques import ActivationCheckpoint, Compile, Float8
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan_lite.distributed.compile import apply_compile, compiled_loss, compiled_so_far
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.optim.loss import IGNORE, token_loss_sum

AOT = Compile(enable=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("model", "section", "kinds"),
    [
        ((DEEP_LLAMA, "untied"), ActivationCheckpoint("none"), 1),
        ((DEEP_LLAMA, "untied"), ActivationCheckpoint("selective", "op"), 1),
        ((DEEP_LLAMA, "untied"), ActivationCheckpoint("selective", "3"), 2),
        # Of a mixture attention and the shared expert, which checkpointing stays around.
        ((MOE, "routed"), ActivationCheckpoint("selective", "3"), 1),
        ((MOE, "shared"), ActivationCheckpoint("selective", "3"), 2),
        ((MOE, "shared"), ActivationCheckpoint("selective", "op"), 2),
    ],
    ids=["none", "op", "every third", "mixture, every third", "shared expert, every third", "shared expert, op"],
)
def test_a_kind_of_block_is_a_graph(model: tuple[ModelSpec, str], section: ActivationCheckpoint, kinds: int) -> None:
    spec, flavor = model
    # More blocks than dynamo compiles of one piece of code.
    args = replace(spec.flavors[flavor], n_layers=12)
    module = spec.build(args)
    initialize(module, 1, lambda name: spec.initial(name, args))
    apply_activation_checkpoint(module, spec.plan(args), section)
    apply_compile(module, spec.plan(args), AOT)
    for _ in range(2):
        module(torch.randint(384, (2, 16))).sum().backward()
        with torch.no_grad():
            module(torch.randint(384, (2, 16)))
    assert counters["stats"]["unique_graphs"] == 2 * kinds  # training and evaluation are two
    assert not counters["graph_break"]


def test_a_block_in_float8_is_a_graph() -> None:
    from torchtitan_lite.quantization.float8 import apply_float8

    args = replace(DEEP_LLAMA.flavors["untied"], n_layers=12)
    module = DEEP_LLAMA.build(args)
    apply_float8(module, Float8(filter_fqns=["output"], emulate=True), torch.device("cpu"))
    apply_compile(module, DEEP_LLAMA.plan(args), AOT)
    for _ in range(2):
        module(torch.randint(384, (2, 16))).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_budget_is_what_a_graph_keeps() -> None:
    args = replace(DEEP_LLAMA.flavors["untied"], n_layers=1)
    kept = []
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        for budget in (0.0, 0.5, 1.0):
            torch._dynamo.reset()
            module = DEEP_LLAMA.build(args)
            section = ActivationCheckpoint("memory_budget", memory_budget=budget)
            apply_activation_checkpoint(module, DEEP_LLAMA.plan(args), section)
            apply_compile(module, DEEP_LLAMA.plan(args), AOT)
            kept.append(_saved(module))
    assert kept[0] < 0.2 * kept[2]
    assert 0.4 * kept[2] < kept[1] < 0.7 * kept[2]


def _saved(module: nn.Module) -> int:
    """Bytes that the blocks' forward keeps for the backward, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    table, hidden = module.rope(torch.arange(64)), torch.randn(2, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for block in module.layers.values():
            hidden = block(hidden, table, None)
        return sum(saved.values())


def test_the_loss_is_a_graph() -> None:
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    compiled_loss(token_loss_sum, AOT)(logits, labels).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled_loss(token_loss_sum, replace(AOT, components=["model"])) is token_loss_sum
    assert compiled_loss(token_loss_sum, Compile()) is token_loss_sum


def _compiled(recipe: str, arguments: list[str]) -> list[dict[str, float]]:
    """After a step and an evaluation, and after more of them, of which the last batch is not full."""
    import torch.distributed as dist

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    torch._dynamo.reset()
    counters.clear()
    plan = plan_job(recipe, arguments, dist.get_world_size())
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), dist.get_rank())
    size = (plan.batch.microbatch_size, plan.config.training.seq_len + 1)
    rows = torch.randint(384, size, generator=torch.Generator().manual_seed(0))
    full = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    ragged = replace(full, labels=full.labels.clone())
    ragged.labels[-1, 7:] = IGNORE
    told = []
    for _ in range(3):
        batches = [full] * (plan.batch.microbatches - 1) + [ragged]
        model.forward_backward(batches)
        model.evaluate(batches)
        told.append(compiled_so_far())
    assert not counters["graph_break"]
    return told


TP, CP, PP, EP = (f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "context", "pipeline", "expert"))
OP = "--activation_checkpoint.selective_ac_option=op"
SHALLOW = ("--model.spec=tests.tiny:SPEC", "--model.flavor=tiny")
F8 = (
    '--model.converters=["quantize.linear.float8"]',
    "--quantize.linear.float8.enable_fsdp_float8_all_gather=true",
    "--quantize.linear.float8.emulate=true",
)
MIXTURE = ("--model.spec=tests.tiny:MOE", "--model.flavor=shared")


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "arguments",
    [[TP, OP], [CP, "--training.loss_chunks=3"], [PP], [OP, *F8, *SHALLOW], [EP, OP, *MIXTURE]],
    ids=["tp, checkpointing by operation", "cp, loss in parts", "pp", "float8, gathered so", "a mixture, ep"],
)
def test_nothing_is_compiled_again(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, arguments: list[str]
) -> None:
    sections: dict[str, Any] = {
        "model": {"spec": "tests.tiny:DEEP_LLAMA", "flavor": "untied"},
        "training": {"local_batch_size": 2, "global_batch_size": 8},
        "compile": {"enable": True, "backend": "aot_eager"},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "8"},
        "data": {"document_mask": False},
    }
    recipe = write_recipe(tmp_path / "recipe.toml", corpus, cache, **sections)
    for first, *later in pool.run(_compiled, 2, str(recipe), arguments):
        assert first["graphs"] > 0
        assert [each["graphs"] for each in later] == [first["graphs"]] * 2


def test_what_is_compiled_is_told(pool: RankPool, tmp_path: Path, corpus: Path, cache: Path) -> None:
    from tests.test_trainer import _run

    compile_section = {"enable": True, "backend": "aot_eager"}
    recipe = write_recipe(tmp_path / "recipe.toml", corpus, cache, compile=compile_section, training={"steps": 2})
    _run(pool, 1, recipe, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "compiled"]
    assert told["step"] == 1
    assert told["graphs"] >= 2
    assert told["seconds"] > 0
