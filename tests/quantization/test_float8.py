"""Float8: which layers, what is refused, how far the numbers move, and the same on every mesh."""

import logging
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranks import RankPool
from tests.test_trainer import _run, _train
from tests.tiny import DEEP_LLAMA, write_recipe
from torchtitan_lite.config.techniques import Float8
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.models.llama3.args import Llama3Args
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.optim.chunked_loss import apply_chunked_loss, loss_and_gradient
from torchtitan_lite.quantization.float8 import apply_float8, float8_gathers, left_out, require_filters, require_shapes

CPU = torch.device("cpu")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def _meta(flavor: str = "untied") -> nn.Module:
    with torch.device("meta"):
        return DEEP_LLAMA.build(DEEP_LLAMA.flavors[flavor])


def _gradients(section: Float8 | None) -> tuple[Tensor, dict[str, Tensor]]:
    args, model = DEEP_LLAMA.flavors["untied"], _meta()
    if section is not None:
        apply_float8(model, section, CPU)
    model.to_empty(device="cpu")
    initialize(model, 1, lambda name: DEEP_LLAMA.initial(name, args))
    rows = torch.randint(384, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_which_layers_compute_in_float8_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = _meta()
    with caplog.at_level(logging.INFO):
        apply_float8(model, Float8(filter_fqns=["output", "layers.7."], emulate=True), CPU)
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert len(names) == 7 * 7
    assert not any(name.startswith("layers.7.") or name == "output" for name in names)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "torchtitan_lite"]
    assert line.startswith("float8    tensorwise, 49 layers: layers.*.attention.wq, layers.*.attention.wk, ")
    assert 'not output: "output" in filter_fqns' in line
    assert 'layers.*.feed_forward.w3: "layers.7." in filter_fqns' in line


def test_an_output_that_is_one_with_the_loss_is_told_to_stay_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    section, model = Float8(emulate=True), _meta()
    apply_chunked_loss(model, "output", 4, loss_and_gradient)
    with caplog.at_level(logging.INFO):
        apply_float8(model, section, CPU, head="output")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "torchtitan_lite"]
    assert line.endswith("; not output: in one with the loss (training.loss_chunks)")
    # What is left of the layers with all others filtered out, and what another pipeline stage is told.
    with pytest.raises(UserError, match="leaves no layer to compute in float8"):
        require_filters(_meta(), Float8(filter_fqns=["layers"]), "output")
    require_filters(_meta(), Float8(filter_fqns=["layers"]))
    stage = _meta()
    stage.output = None  # type: ignore[assignment]
    assert not left_out(stage, section, "output")


def test_that_products_are_slow_on_a_cpu_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for emulate in (False, True):
        caplog.clear()
        apply_float8(_meta(), Float8(emulate=emulate), CPU)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any("set quantize.linear.float8.emulate = true" in line for line in told) is not emulate


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (Float8(filter_fqns=["outptu"]), '"outptu" is in no linear layer\'s name; some are layers.0.attention.wq'),
        (Float8(filter_fqns=["layers", "output"]), "leaves no layer to compute in float8"),
        (Float8(filter_fqns=["auto_filter_small"]), "leaves no layer to compute in float8"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(section: Float8, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        require_filters(_meta(), section)


def test_shapes_that_float8_cannot_take_are_refused() -> None:
    with torch.device("meta"):
        model = LLAMA3.build(Llama3Args(64, 1, 4, 2, 88, vocab_size=384))
    section = Float8()
    apply_float8(model, section, CPU)
    with pytest.raises(UserError, match=r"w1 is 88 x 64 on a rank, .* multiples of 16; add \"w1\" to"):
        require_shapes(model, section)
    require_shapes(model, Float8(emulate=True))


def test_small_layers_are_left_on_request() -> None:
    with torch.device("meta"):
        model = LLAMA3.build(LLAMA3.flavors["8B"])
    left = left_out(model, Float8(filter_fqns=["auto_filter_small", "output"]))
    assert left["output"] == '"output" in filter_fqns'
    assert {name.split(".")[-1] for name in left} == {"wk", "wv", "output"}
    assert left["layers.3.attention.wk"] == "too small to gain (auto_filter_small)"


def test_compiled_rows_are_rounded_where_eager_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "emulate_precision_casts", False)
    for recipe, compiled in (("tensorwise", True), ("rowwise", False), ("rowwise", True), ("rowwise_with_gw_hp", True)):
        config.emulate_precision_casts = False
        apply_float8(_meta(), Float8(recipe, emulate=True), CPU, compiled=compiled)  # type: ignore[arg-type]
        assert config.emulate_precision_casts is (compiled and recipe != "tensorwise"), (recipe, compiled)


def test_hardware_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(UserError, match=r"A100 has no float8 products .*emulate = true, or take it out"):
        apply_float8(_meta(), Float8(), torch.device("cuda"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_float32_within_float8s_rounding(recipe: str) -> None:
    loss, grads = _gradients(None)
    found, near = _gradients(Float8(recipe, filter_fqns=["output"]))  # type: ignore[arg-type]
    assert 0 < abs(float(found / loss - 1)) < 1e-3
    for name, grad in grads.items():
        difference = float((near[name] - grad).norm() / grad.norm())
        assert difference < 0.2, (name, difference)
    # What has float8's products has its rounding, in each of them.
    assert all(not torch.equal(near[name], grad) for name, grad in grads.items() if "layers" in name)


def test_emulation_rounds_as_the_products_do() -> None:
    section = {"filter_fqns": ["output"]}
    (_, real), (_, emulated) = (_gradients(Float8(emulate=emulate, **section)) for emulate in (False, True))  # type: ignore[arg-type]
    for name, grad in real.items():
        assert float((emulated[name] - grad).norm() / grad.norm()) < 1e-3, name


# Emulated: this CPU's own products in float8 take a hundred times as long, and are held to these above.
F8 = {"filter_fqns": ["output"], "recipe_name": "tensorwise", "emulate": True}
_AG = "--quantize.linear.float8.enable_fsdp_float8_all_gather=true"
_PRE = "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=true"


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    # A micro-batch has scales of its own: the same micro-batches on every mesh.
    sections: dict[str, Any] = {
        "model": {"spec": "tests.tiny:SPEC", "flavor": "tiny", "converters": ["quantize.linear.float8"]},
        "quantize.linear.float8": F8,
        "training": {"local_batch_size": 1, "global_batch_size": 2, "steps": 4},
        "checkpoint": {"enable": True, "interval": 2},
    }
    return write_recipe(tmp_path / "recipe.toml", corpus, cache, **sections)


@pytest.mark.ranks(2)
def test_float8_is_the_same_on_every_mesh_that_has_the_same_micro_batches(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    one = [line["loss"] for line in _run(pool, 1, recipe, tmp_path / "one")]
    for name, mesh in (
        ("fsdp", ()),
        ("gathered in float8", (_AG,)),
        ("scales ahead", (_AG, _PRE)),
        ("tp", ("--parallelism.tensor_parallel_degree=2",)),
        ("pp", ("--parallelism.pipeline_parallel_degree=2",)),
    ):
        losses = [line["loss"] for line in _run(pool, 2, recipe, tmp_path / name, *mesh)]
        assert losses[0] == pytest.approx(one[0], rel=1e-6), name
        # A difference in the last bit rounds to another float8 here and there.
        assert losses == pytest.approx(one, rel=2e-4), name


def _assembled(recipe: str) -> tuple[str, bool]:
    """What a run with the loss in parts, compiled, says of float8; whether inductor rounds where eager mode does."""
    import torch.distributed as dist
    from torch._inductor import config

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    rows = "--quantize.linear.float8.recipe_name=rowwise"
    plan = plan_job(recipe, ["--training.loss_chunks=4", "--compile.enable=true", rows], 1)
    logger = logging.getLogger("torchtitan_lite")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with patch.object(config, "emulate_precision_casts", False):
            parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
            assemble(parts, build_mesh(plan.dims, "cpu"), CPU, dist.get_rank())
            rounds = bool(config.emulate_precision_casts)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return next(line for line in told if line.startswith("float8")), rounds


def test_a_run_leaves_the_output_out_that_is_one_with_its_loss(pool: RankPool, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('filter_fqns = ["output"]', "filter_fqns = []"))
    ((line, rounds),) = pool.run(_assembled, 1, str(recipe))
    assert line.endswith("; not output: in one with the loss (training.loss_chunks)")
    assert rounds


def _warned(recipe: str) -> list[str]:
    """What a step in float8 warns of, with all layers in one unit of FSDP but for the root."""
    import torch.distributed as dist

    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.data.loader import Batch
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    plan = plan_job(recipe, [], 2)
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = assemble(parts, build_mesh(plan.dims, "cpu"), CPU, dist.get_rank())
        rows = torch.randint(384, (1, 33))
        model.forward_backward([Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())])
    return [str(each.message) for each in told if "view tensor" in str(each.message)]


def test_views_that_our_models_return_are_no_users_business(pool: RankPool, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('filter_fqns = ["output"]', "filter_fqns = []"))
    assert pool.run(_warned, 2, str(recipe)) == [[], []]


def _train_as_on_cuda(recipe: str, *overrides: str) -> int:
    """Gathers of tensor parallelism in float8, which gloo takes as bytes. Returns how many there were."""
    from torchao.float8.float8_ops import FLOAT8_OPS_TABLE
    from torchao.float8.float8_training_tensor import Float8TrainingTensor

    gather, cuda, gathers = torch.ops._c10d_functional.all_gather_into_tensor.default, torch.device("cuda"), []

    def as_bytes(op: Any, args: Any, kwargs: Any = None) -> Tensor:
        part = args[0]
        gathers.append(part.shape)
        whole = op(part._data.contiguous().view(torch.uint8), *args[1:]).view(part._data.dtype)
        properties = part._scale, part._orig_dtype, part._linear_mm_config, part._gemm_input_role
        return Float8TrainingTensor(whole, *properties)

    def on_cuda(module: nn.Module, section: Float8, styles: Any, device: torch.device) -> Any:
        return float8_gathers(module, section, styles, cuda)

    with (
        patch.dict(FLOAT8_OPS_TABLE, {gather: as_bytes}),
        patch("torchtitan_lite.quantization.float8.float8_gathers", on_cuda),
    ):
        assert _train(recipe, *overrides) == 0
    return len(gathers)


@pytest.mark.ranks(2)
def test_tensor_parallelism_gathers_in_float8(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    one = [line["loss"] for line in _run(pool, 1, recipe, tmp_path / "one", "--checkpoint.enable=false")]
    mesh = ("--parallelism.tensor_parallel_degree=2", "--checkpoint.enable=false")
    gathers = pool.run(_train_as_on_cuda, 2, str(recipe), f"--job.dump_folder={tmp_path / 'tp'}", *mesh, group=False)
    # In each of four steps, of two micro-batches, of three blocks: two inputs, and the gradients of two outputs.
    assert gathers == [4 * 2 * 3 * 4] * 2
    losses = [line["loss"] for line in read_lines(tmp_path / "tp" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(one[0], rel=1e-6)
    assert losses == pytest.approx(one, rel=2e-4)


@pytest.mark.ranks(2)
def test_weights_that_are_gathered_in_float8_are_saved_whole(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    whole = [line["loss"] for line in _run(pool, 2, recipe, tmp_path / "whole", _AG, _PRE)]
    _run(pool, 2, recipe, tmp_path / "parts", _AG, _PRE, "--training.steps=2")
    resumed = _run(pool, 2, recipe, tmp_path / "parts", _AG, _PRE)
    assert [line["loss"] for line in resumed] == whole


def test_two_hundred_steps_end_near_those_in_float32(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    settings = ("--training.steps=200", "--lr_scheduler.total_steps=200", "--checkpoint.enable=false")
    settings += ("--training.local_batch_size=4", "--training.global_batch_size=4")

    def end(folder: str, *overrides: str) -> float:
        lines = _run(pool, 1, recipe, tmp_path / folder, *settings, *overrides)
        return sum(line["loss"] for line in lines[-20:]) / 20

    expected = end("float32", "--model.converters=[]")
    for name in RECIPES:
        found = end(name, f"--quantize.linear.float8.recipe_name={name}")
        assert abs(found - expected) < 0.01 * expected, (name, found, expected)
