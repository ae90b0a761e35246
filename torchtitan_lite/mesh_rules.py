"""Rules across recipe, mesh and model, one function each: the name says the rule, the message values and the mend.

Rules of the recipe alone stand in config/rules.py. No torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, floor, gcd, lcm, log10
from operator import attrgetter

from torchtitan_lite.config.resolution import uses_float8, uses_grouped_float8
from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.distributed.parallel_dims import ParallelDims, divisors
from torchtitan_lite.distributed.pipeline_plan import PipelinePlan
from torchtitan_lite.distributed.plans import ParallelPlan, capacity
from torchtitan_lite.errors import UserError


@dataclass(frozen=True)
class Case:
    """What a rule looks at. model: family and flavor, for messages. max_seq_len: positions that the model has."""

    config: JobConfig
    dims: ParallelDims
    model: str
    max_seq_len: int
    plan: ParallelPlan
    pipeline: PipelinePlan | None


def model_declares_the_technique(case: Case) -> None:
    dims, plan = case.dims, case.plan
    degrees = {"tensor": dims.tp, "context": dims.cp, "expert": dims.ep, "pipeline": dims.pp}
    offers = {"tensor": plan.tensor, "context": plan.context, "expert": plan.experts, "pipeline": plan.stages}
    for technique, degree in degrees.items():
        if degree > 1 and not offers[technique]:
            reason = plan.without.get(technique, "its plan does not say where it would attach")
            raise UserError(
                f"parallelism.{technique}_parallel_degree = {degree}: {case.model} has no {technique} parallelism: "
                f"{reason}; set it to 1"
            )


def tensor_degree_divides_the_model(case: Case) -> None:
    sizes = case.plan.tensor.divides if case.plan.tensor else {}
    for name, size in sizes.items():
        if size % case.dims.tp:
            raise UserError(
                f"parallelism.tensor_parallel_degree = {case.dims.tp} does not divide {name} = {size} of {case.model}; "
                f"valid: {divisors(gcd(*sizes.values()))}"
            )


def sequence_fits_the_model(case: Case) -> None:
    if (seq_len := case.config.training.seq_len) > case.max_seq_len:
        raise UserError(
            f"training.seq_len = {seq_len} is longer than the {case.max_seq_len} positions of {case.model}; shorten it"
        )


def sequence_divides_over_its_ranks(case: Case) -> None:
    seq_len, tp, cp = case.config.training.seq_len, case.dims.tp, case.dims.cp
    balanced = cp > 1 and case.config.parallelism.context_parallel_rotate_method == "allgather"
    parts, shown = tp * cp, f"tensor_parallel_degree {tp} x context_parallel_degree {cp}"
    if balanced:  # two pieces a rank, each of which tensor parallelism may cut through
        parts, shown = cp * lcm(2, tp), f"{shown}, in two pieces a context-parallel rank"
    if seq_len % parts:
        raise UserError(
            f"training.seq_len = {seq_len} does not divide over {shown}; nearest: {_nearest_multiples(seq_len, parts)}"
        )


def heads_divide_over_context_ranks(case: Case) -> None:
    plan, cp, tp = case.plan.context, case.dims.cp, case.dims.tp
    if cp == 1 or plan is None or case.config.parallelism.context_parallel_rotate_method != "alltoall":
        return
    heads, kv_heads = plan.heads // tp, plan.kv_heads // tp
    valid = [n for n in range(1, heads + 1) if _exchanges_heads(heads, kv_heads, n)]
    if cp not in valid:
        raise UserError(
            f'parallelism.context_parallel_degree = {cp} with context_parallel_rotate_method = "alltoall" does not '
            f"divide the {heads} query heads and {kv_heads} key heads that a rank of {case.model} holds; valid: "
            f'{", ".join(map(str, valid))}, or the method "allgather"'
        )


def top_k_is_within_the_experts(case: Case) -> None:
    experts = case.plan.experts
    if experts and not 1 <= experts.top_k <= experts.num_experts:
        raise UserError(
            f"{case.model}: top_k = {experts.top_k}, and there are {experts.num_experts} experts; valid: 1 to "
            f"{experts.num_experts}"
        )


def expert_degree_divides_ranks_and_experts(case: Case) -> None:
    experts, dims = case.plan.experts, case.dims
    ranks = dims.dp_shard * dims.cp
    if experts and (both := gcd(ranks, experts.num_experts)) % dims.ep:
        raise UserError(
            f"parallelism.expert_parallel_degree = {dims.ep} must divide data_parallel_shard_degree x "
            f"context_parallel_degree = {dims.dp_shard} x {dims.cp}, and the {experts.num_experts} experts of "
            f"{case.model}; valid: {divisors(both)}"
        )


def capacity_takes_a_token(case: Case) -> None:
    experts, factor, seq_len = case.plan.experts, case.config.moe.capacity_factor, case.config.training.seq_len
    if experts and factor != -1 and capacity(factor, seq_len, experts.top_k, experts.num_experts) < 1:
        least = experts.num_experts / (seq_len * experts.top_k)
        raise UserError(
            f"moe.capacity_factor = {factor} drops every token: {factor} x {seq_len} tokens x top_k {experts.top_k} / "
            f"{experts.num_experts} experts of {case.model} is less than one; valid: {_rounded_up(least)} or more, or "
            "-1 to drop none"
        )


def split_backward_needs_whole_parameters(case: Case) -> None:
    """torch's zero-bubble schedules with FSDP2 that frees parameters in between give wrong gradients, silently."""
    policy = case.config.parallelism.fsdp_reshard_after_forward
    if case.pipeline and case.pipeline.split_backward and policy == "always":
        raise UserError(
            f'parallelism.fsdp_reshard_after_forward = "always" gives wrong gradients with {case.pipeline.schedule}, '
            'which runs its backward in halves; set it to "default" or "never"'
        )


def split_backward_is_not_compiled(case: Case) -> None:
    if case.pipeline and case.pipeline.split_backward and _compiles_blocks(case):
        raise UserError(
            f"compile.enable = true does not work with {case.pipeline.schedule}, which runs its backward in halves; "
            "set it to false or choose 1F1B, GPipe, Interleaved1F1B or LoopedBFS"
        )


def split_backward_keeps_no_results(case: Case) -> None:
    section = case.config.activation_checkpoint
    op = section.mode == "selective" and section.selective_ac_option == "op"
    if op and case.pipeline and case.pipeline.split_backward:
        raise UserError(
            f'activation_checkpoint.selective_ac_option = "op" does not work with {case.pipeline.schedule}, which runs '
            "its backward in halves: torch gives the kept results to one of them; choose a number of blocks, "
            'mode = "full" or "none", or 1F1B, GPipe, Interleaved1F1B or LoopedBFS'
        )


def compile_needs_blocks(case: Case) -> None:
    if _compiles_blocks(case) and not any(unit[0].endswith(".*") for unit in case.plan.fsdp_units):
        raise UserError(
            f"compile.enable = true compiles blocks, and the plan of {case.model} names none (as layers.* in "
            'fsdp_units); set it to false, or compile.components to ["loss"]'
        )


def checkpointing_needs_blocks(case: Case) -> None:
    mode = case.config.activation_checkpoint.mode
    if mode != "none" and not any(unit[0].endswith(".*") for unit in case.plan.fsdp_units):
        raise UserError(
            f'activation_checkpoint.mode = "{mode}" works on blocks, and the plan of {case.model} names none (as '
            'layers.* in fsdp_units); set it to "none"'
        )


def chunked_loss_needs_a_head(case: Case) -> None:
    chunks = case.config.training.loss_chunks
    if chunks > 1 and case.plan.head is None:
        raise UserError(
            f"training.loss_chunks = {chunks}: the plan of {case.model} names no head, the module that makes logits; "
            "set it to 1"
        )
    if chunks > 1 and case.config.parallelism.disable_loss_parallel:
        raise UserError(
            f"training.loss_chunks = {chunks} makes no logits that parallelism.disable_loss_parallel = true could "
            "gather; set one of them back"
        )


def float8_gathers_need_shards(case: Case) -> None:
    section = case.config.quantize.linear.float8
    if uses_float8(case.config) and section.enable_fsdp_float8_all_gather and case.dims.dp_shard * case.dims.cp == 1:
        raise UserError(
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: no parameters are sharded on "
            f"{case.dims}, there is nothing to gather; set it to false"
        )


def float8_of_experts_needs_experts(case: Case) -> None:
    if uses_grouped_float8(case.config) and case.plan.experts is None:
        raise UserError(
            f'model.converters: {case.model} has no experts for "quantize.grouped_mm.float8"; take it out of the list'
        )


def reshard_needs_shards(case: Case) -> None:
    policy = case.config.parallelism.fsdp_reshard_after_forward
    shards = case.dims.dp_shard * case.dims.cp
    if case.plan.experts:
        shards *= case.dims.tp  # over which experts are sharded too
    if policy != "default" and shards == 1:
        raise UserError(
            f'parallelism.fsdp_reshard_after_forward = "{policy}": no parameters are sharded on {case.dims}, there is '
            'nothing to gather again; leave it at "default"'
        )


RULES: tuple[Callable[[Case], None], ...] = (
    model_declares_the_technique,
    tensor_degree_divides_the_model,
    sequence_fits_the_model,
    sequence_divides_over_its_ranks,
    heads_divide_over_context_ranks,
    top_k_is_within_the_experts,
    expert_degree_divides_ranks_and_experts,
    capacity_takes_a_token,
    split_backward_needs_whole_parameters,
    split_backward_is_not_compiled,
    split_backward_keeps_no_results,
    compile_needs_blocks,
    checkpointing_needs_blocks,
    chunked_loss_needs_a_head,
    float8_gathers_need_shards,
    float8_of_experts_needs_experts,
    reshard_needs_shards,
)


@dataclass(frozen=True)
class _Need:
    """What keys of a section (names, or all of them) need to count, and why they do not else. met: of the recipe and of
    whether the model has experts."""

    section: str
    keys: str
    reason: str
    met: Callable[[JobConfig, bool], object]


def _uses_muon(config: JobConfig, experts: bool) -> bool:
    return "Muon" in {config.optimizer.name, *(group.optimizer_name for group in config.optimizer.param_groups)}


def _has_experts(config: JobConfig, experts: bool) -> bool:
    return experts


_ALL, _NO_EXPERTS = "", "on a model without experts"
_NEEDS = (
    _Need(
        "parallelism",
        "disable_loss_parallel",
        "while parallelism.tensor_parallel_degree = 1",
        lambda config, _: config.parallelism.tensor_parallel_degree > 1,
    ),
    _Need(
        "parallelism",
        "context_parallel_rotate_method",
        "while parallelism.context_parallel_degree = 1",
        lambda config, _: config.parallelism.context_parallel_degree > 1,
    ),
    _Need(
        "parallelism",
        "pipeline_parallel_schedule pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size "
        "pipeline_parallel_layers_per_stage module_fqns_per_model_part",
        "while parallelism.pipeline_parallel_degree = 1",
        lambda config, _: config.parallelism.pipeline_parallel_degree > 1,
    ),
    _Need(
        "activation_checkpoint",
        "selective_ac_option",
        'without activation_checkpoint.mode = "selective"',
        lambda config, _: config.activation_checkpoint.mode == "selective",
    ),
    _Need(
        "activation_checkpoint",
        "per_op_sac_force_recompute_mm_shapes_by_fqns",
        'without activation_checkpoint.selective_ac_option = "op"',
        lambda config, _: config.activation_checkpoint.selective_ac_option == "op",
    ),
    _Need(
        "activation_checkpoint",
        "memory_budget",
        'without activation_checkpoint.mode = "memory_budget"',
        lambda config, _: config.activation_checkpoint.mode == "memory_budget",
    ),
    _Need("optimizer", "momentum ns_steps adjust_lr_fn", "without Muon", _uses_muon),
    _Need("compile", "backend components", "while compile.enable = false", lambda config, _: config.compile.enable),
    _Need(
        "quantize.linear.float8",
        _ALL,
        'without "quantize.linear.float8" in model.converters',
        lambda config, _: uses_float8(config),
    ),
    _Need(
        "quantize.grouped_mm.float8",
        _ALL,
        'without "quantize.grouped_mm.float8" in model.converters',
        lambda config, _: uses_grouped_float8(config),
    ),
    _Need("moe", _ALL, _NO_EXPERTS, _has_experts),
    _Need(
        "moe",
        "overlap_halves",
        "while parallelism.expert_parallel_degree = 1",
        lambda config, experts: not experts or config.parallelism.expert_parallel_degree > 1,
    ),
    _Need("debug", "moe_force_load_balance", _NO_EXPERTS, _has_experts),
    _Need(
        "profiling",
        "save_traces_folder profiler_active profiler_warmup",
        "while profiling.enable_profiling = false",
        lambda config, _: config.profiling.enable_profiling,
    ),
    _Need(
        "profiling",
        "profile_freq",
        "while profiling.enable_profiling and profiling.enable_memory_snapshot are false",
        lambda config, _: config.profiling.enable_profiling or config.profiling.enable_memory_snapshot,
    ),
    _Need(
        "profiling",
        "save_memory_snapshot_folder",
        "while profiling.enable_memory_snapshot = false",
        lambda config, _: config.profiling.enable_memory_snapshot,
    ),
    _Need(
        "checkpoint",
        "interval interval_minutes keep_latest_k async_mode strict load_step last_save_model_only",
        "while checkpoint.enable = false",
        lambda config, _: config.checkpoint.enable,
    ),
    _Need(
        "checkpoint",
        "initial_load_model_only",
        "while checkpoint.initial_load_path is empty",
        lambda config, _: config.checkpoint.initial_load_path,
    ),
    _Need(
        "faults",
        "max_in_a_row then",
        "while faults.skip_nonfinite = false",
        lambda config, _: config.faults.skip_nonfinite,
    ),
    _Need(
        "faults",
        "warmup_steps",
        "while faults.loss_spike_sigmas and faults.grad_norm_spike_sigmas are 0",
        lambda config, _: config.faults.loss_spike_sigmas or config.faults.grad_norm_spike_sigmas,
    ),
)


def without_effect(config: JobConfig, *, experts: bool) -> list[str]:
    """Keys that a recipe changes and that do nothing on its mesh or its model, each with the reason.

    experts: whether the model has some.
    """
    return [line for need in _NEEDS if not need.met(config, experts) for line in _idle(need, config)]


def _idle(need: _Need, config: JobConfig) -> Iterator[str]:
    """A line for each key of the section that is changed."""
    section = attrgetter(need.section)(config)
    defaults = type(section)()
    for key in need.keys.split() or vars(section):
        if (value := getattr(section, key)) != getattr(defaults, key):
            yield f"{need.section}.{key} = {value} has no effect {need.reason}"


def _compiles_blocks(case: Case) -> bool:
    return case.config.compile.enable and "model" in case.config.compile.components


def _exchanges_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _rounded_up(number: float) -> float:
    """To three digits, so that what a message calls valid is."""
    scale = 10.0 ** (2 - floor(log10(number)))
    return ceil(number * scale) / scale


def _nearest_multiples(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)
