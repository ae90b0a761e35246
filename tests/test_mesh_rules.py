"""Combinations of recipe, mesh and model that cannot work: refused with the value and a mend that works."""

import re
from pathlib import Path

import pytest

from tests.tiny import write_recipe
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import JobPlan, plan_job

P = "--parallelism."
TP, CP, PP = f"{P}tensor_parallel_degree=", f"{P}context_parallel_degree=", f"{P}pipeline_parallel_degree="
EP, MOE = f"{P}expert_parallel_degree=", ("--model.spec=tests.tiny:MOE", "--model.flavor=routed")
ULYSSES = f"{P}context_parallel_rotate_method=alltoall"
ZBV = f"{P}pipeline_parallel_schedule=ZBVZeroBubble"
SEQ = "--training.seq_len="
OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = {"spec": "tests.tiny:DEEP_LLAMA", "flavor": "untied"}
    return write_recipe(tmp_path / "deep.toml", tmp_path / "corpus", tmp_path / "cache", model=model)


def _plan(recipe: Path, ranks: int, *overrides: str) -> JobPlan:
    return plan_job(recipe, overrides, ranks)


# Ranks, overrides, what the line says, overrides that mend it. DEEP_LLAMA: 8 heads, 4 key heads, 8 layers.
REFUSED = [
    (3, (f"{TP}3",), r"tensor_parallel_degree = 3 does not divide n_heads = 8.*valid: 1, 2, 4$", (f"{TP}1",)),
    (8, (f"{TP}8",), r"tensor_parallel_degree = 8 does not divide n_kv_heads = 4", (f"{TP}4",)),
    (2, (f"{TP}2", f"{SEQ}33"), r"seq_len = 33 does not divide over .*nearest: 32 or 34", (f"{TP}2", f"{SEQ}34")),
    (2, (f"{CP}2", f"{SEQ}34"), r"seq_len = 34 .*two pieces.*nearest: 32 or 36", (f"{CP}2", f"{SEQ}36")),
    (2, (f"{CP}2", f"{SEQ}33", ULYSSES), r"seq_len = 33.*nearest: 32 or 34", (f"{CP}2", f"{SEQ}34", ULYSSES)),
    (8, (f"{CP}4", f"{TP}2", f"{SEQ}36"), r"seq_len = 36.*nearest: 32 or 40", (f"{CP}4", f"{TP}2", f"{SEQ}40")),
    (8, (f"{CP}2", f"{TP}4", f"{SEQ}36"), r"seq_len = 36.*nearest: 32 or 40", (f"{CP}2", f"{TP}4", f"{SEQ}40")),
    (
        16,
        (f"{CP}8", f"{TP}2", f"{SEQ}48", ULYSSES),
        r"degree = 8 .*divide the 4 query heads and 2 key heads that a rank.*valid: 1, 2, 4, or the method",
        (f"{CP}4", f"{TP}2", f"{SEQ}48", ULYSSES),
    ),
    (3, (f"{CP}3", f"{SEQ}36", ULYSSES), r"degree = 3 .*divide the 8 query heads and 4 key.*valid: 1, 2, 4, 8", ()),
    (
        8,
        (f"{CP}8", f"{TP}1", f"{SEQ}1024"),
        r"seq_len = 1024 is longer than the 512 positions",
        (f"{CP}8", f"{SEQ}512"),
    ),
    (9, (f"{PP}9",), r"makes 9 stages of 8 layers; .*use a degree of 8 or less", (f"{PP}1",)),
    (
        4,
        (f"{PP}2", ZBV, f"{P}fsdp_reshard_after_forward=always"),
        r'reshard_after_forward = "always" gives wrong gradients with ZBVZeroBubble',
        (f"{PP}2", ZBV, f"{P}fsdp_reshard_after_forward=never"),
    ),
    (
        2,
        (f"{PP}2", ZBV, "--compile.enable=true"),
        "does not work with ZBVZeroBubble",
        (f"{PP}2", "--compile.enable=true"),
    ),
    (
        2,
        (f"{PP}2", ZBV, *OP),
        'selective_ac_option = "op" does not work with ZBVZeroBubble',
        (f"{PP}2", *OP),
    ),
    (
        2,
        (f"{TP}2", f"{P}disable_loss_parallel=true", "--training.loss_chunks=4"),
        "training.loss_chunks = 4 makes no logits that",
        (f"{TP}2", "--training.loss_chunks=4"),
    ),
    (2, (f"{TP}2", f"{P}fsdp_reshard_after_forward=never"), "no parameters are sharded", (f"{TP}2",)),
    (2, (f"{PP}2", "--model.flavor=tied"), "deep_llama tied has no pipeline parallelism: its output", (f"{PP}2",)),
    (2, (f"{EP}2",), "deep_llama untied has no expert parallelism: it is dense; set it to 1", (f"{EP}1",)),
    (3, (*MOE, f"{EP}3"), "degree = 3 must divide .* 3 x 1, and the 8 experts of tiny_moe routed; valid: 1$", (*MOE,)),
    (6, (*MOE, f"{EP}4"), "degree = 4 must divide .* 6 x 1, and the 8 experts.*; valid: 1, 2$", (*MOE, f"{EP}2")),
    (4, (*MOE, f"{CP}2", f"{EP}3"), "degree = 3 must divide .* 2 x 2.*; valid: 1, 2, 4$", (*MOE, f"{CP}2", f"{EP}4")),
    (4, (*MOE, f"{TP}2", f"{EP}4"), "degree = 4 must divide .* 2 x 1.*; valid: 1, 2$", (*MOE, f"{TP}2", f"{EP}2")),
    (
        1,
        (*MOE, "--moe.capacity_factor=0.12"),
        r"capacity_factor = 0.12 drops every token: 0.12 x 32 tokens x top_k 2 / 8 .*valid: 0.125 or more, or -1",
        (*MOE, "--moe.capacity_factor=0.125"),
    ),
    (
        1,
        (*MOE, "--moe.capacity_factor=0.1", f"{SEQ}36"),
        r"capacity_factor = 0.1 drops every token.*valid: 0.112 or more",
        (*MOE, "--moe.capacity_factor=0.112", f"{SEQ}36"),
    ),
    (1, (*MOE, "--moe.capacity_factor=0"), r"capacity_factor = 0.0: must be more than 0, or -1", (*MOE,)),
    (2, (*MOE, f"{TP}2", f"{P}expert_tensor_parallel_degree=2"), "does not split experts.*set it to 1", (*MOE,)),
    (2, (*MOE, f"{P}expert_parallel_comm_backend=deepep"), r'"deepep": expected .*"standard"', (*MOE,)),
    (3, (f"{TP}2",), "3 ranks cannot be shared out.*use a multiple of 2 ranks", ()),
]


@pytest.mark.parametrize(("ranks", "overrides", "message", "mended"), REFUSED)
def test_what_cannot_work_is_refused_with_a_mend_that_works(
    recipe: Path, ranks: int, overrides: tuple[str, ...], message: str, mended: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=message):
        _plan(recipe, ranks, *overrides)
    _plan(recipe, ranks, *mended)


def test_every_degree_that_a_message_calls_valid_is(recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        _plan(recipe, 3, f"{CP}3", f"{SEQ}48", ULYSSES)
    degrees = re.search(r"valid: ([\d, ]+), or", str(caught.value))
    assert degrees is not None
    for degree in degrees[1].split(", "):
        _plan(recipe, int(degree), f"{CP}{degree}", f"{SEQ}48", ULYSSES)


def test_a_plan_without_a_technique_is_told_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tests import tiny
    from torchtitan_lite.distributed.plans import ParallelPlan

    bare = replace(tiny.DEEP_LLAMA, plan=lambda args: ParallelPlan(fsdp_units=(("layers.*",),)))
    monkeypatch.setattr(tiny, "DEEP_LLAMA", bare)
    bare_units = replace(tiny.DEEP_LLAMA, plan=lambda args: ParallelPlan(fsdp_units=(("norm",),)))
    for technique in ("tensor", "context", "expert", "pipeline"):
        with pytest.raises(UserError, match=f"has no {technique} parallelism: its plan does not say where"):
            _plan(recipe, 2, f"{P}{technique}_parallel_degree=2")
    monkeypatch.setattr(tiny, "DEEP_LLAMA", bare_units)
    with pytest.raises(UserError, match=r"compile.enable = true compiles blocks, and the plan .* names none"):
        _plan(recipe, 2, "--compile.enable=true")
    with pytest.raises(UserError, match=r'checkpoint.mode = "full" works on blocks, and the plan .* names none'):
        _plan(recipe, 2, "--activation_checkpoint.mode=full")
    with pytest.raises(UserError, match=r"loss_chunks = 2: the plan of .* names no head"):
        _plan(recipe, 2, "--training.loss_chunks=2")


def test_more_choices_than_experts_are_refused_whoever_made_the_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tests import tiny
    from torchtitan_lite.models.common.moe_shape import MoEShape

    args = tiny.MOE.flavors["routed"]
    flavors = {str(top_k): replace(args, moe=MoEShape(8, top_k)) for top_k in (0, 8, 9)}
    monkeypatch.setattr(tiny, "MOE", replace(tiny.MOE, flavors=flavors))
    for top_k in (0, 9):
        with pytest.raises(UserError, match=f"tiny_moe {top_k}: top_k = {top_k}, and there are 8 experts; .* 1 to 8"):
            _plan(recipe, 1, MOE[0], f"--model.flavor={top_k}")
    _plan(recipe, 1, MOE[0], "--model.flavor=8")


def test_settings_of_experts_without_any_are_said_to_do_nothing(recipe: Path) -> None:
    for override in ("moe.z_loss_coeff=0.1", "moe.overlap_halves=true", "debug.moe_force_load_balance=true"):
        (warning,) = _plan(recipe, 1, f"--{override}").warnings()
        assert warning.startswith(override.partition("=")[0])
        assert "has no effect on a model without experts" in warning
        if "halves" not in override:
            assert _plan(recipe, 1, *MOE, f"--{override}").warnings() == []
    (warning,) = _plan(recipe, 2, *MOE, "--moe.overlap_halves=true").warnings()
    assert "overlap_halves = True has no effect while parallelism.expert_parallel_degree = 1" in warning
    assert _plan(recipe, 2, *MOE, f"{EP}2", "--moe.overlap_halves=true").warnings() == []


def test_experts_are_shards_under_tensor_parallelism_alone(recipe: Path) -> None:
    """What fsdp_reshard_after_forward says then has an effect."""
    _plan(recipe, 2, *MOE, f"{TP}2", f"{P}fsdp_reshard_after_forward=never")


def test_what_has_no_effect_is_said(recipe: Path) -> None:
    idle = {
        "--optimizer.momentum=0.9": "optimizer.momentum = 0.9 has no effect without Muon",
        "--profiling.profiler_active=2": "profiler_active = 2 has no effect while profiling.enable_profiling = false",
        "--profiling.profile_freq=5": "has no effect while profiling.enable_profiling and profiling.enable_memory_sna",
        "--profiling.save_memory_snapshot_folder=m": "has no effect while profiling.enable_memory_snapshot = false",
        "--checkpoint.strict=true": "checkpoint.strict = True has no effect while checkpoint.enable = false",
        "--checkpoint.load_step=5": "checkpoint.load_step = 5 has no effect while checkpoint.enable = false",
        "--checkpoint.initial_load_model_only=false": "has no effect while checkpoint.initial_load_path is empty",
        "--faults.warmup_steps=50": "faults.warmup_steps = 50 has no effect while faults.loss_spike_sigmas and",
        "--compile.backend=eager": "compile.backend = eager has no effect while compile.enable = false",
        "--activation_checkpoint.memory_budget=0.2": "memory_budget = 0.2 has no effect without activation_checkpoint",
        "--quantize.linear.float8.emulate=true": 'emulate = True has no effect without "quantize.linear.float8" in',
        OP[1]: "selective_ac_option = op has no effect without activation_checkpoint.mode",
        ULYSSES: "rotate_method = alltoall has no effect while parallelism.context_parallel_degree = 1",
        f"{P}disable_loss_parallel=true": "disable_loss_parallel = True has no effect while parallelism.tensor",
        ZBV: "pipeline_parallel_schedule = ZBVZeroBubble has no effect while parallelism.pipeline_parallel_degree = 1",
    }
    for override, said in idle.items():
        (warning,) = _plan(recipe, 2, override).warnings()
        assert said in warning
    assert _plan(recipe, 2, f"{CP}2", ULYSSES).warnings() == []
    assert _plan(recipe, 2).warnings() == []


def test_fewer_micro_batches_than_stages_are_warned_of_with_the_bubble(recipe: Path) -> None:
    plan = _plan(recipe, 4, f"{PP}4", "--training.global_batch_size=2")
    assert (plan.batch.microbatches, plan.batch.microbatch_size) == (4, 1)
    (warning,) = plan.warnings()
    assert "2 micro-batches for 4 pipeline stages: 71% of each rank's time" in warning
    assert _plan(recipe, 4, f"{PP}4").warnings() == []
