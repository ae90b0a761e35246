"""Rules across recipe, mesh and model, one function each: the name says the rule, the message values and the mend.

Rules of the recipe alone stand in config/rules.py. No torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, floor, gcd, lcm, log10

from torchtitan_lite.config.schema import Checkpoint, Faults, JobConfig
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
    if case.pipeline and case.pipeline.split_backward and case.config.compile.enable:
        raise UserError(
            f"compile.enable = true does not work with {case.pipeline.schedule}, which runs its backward in halves; "
            "set it to false or choose 1F1B, GPipe, Interleaved1F1B or LoopedBFS"
        )


def compile_needs_blocks(case: Case) -> None:
    if case.config.compile.enable and not any(unit[0].endswith(".*") for unit in case.plan.fsdp_units):
        raise UserError(
            f"compile.enable = true compiles blocks, and the plan of {case.model} names none (as layers.* in "
            "fsdp_units); set it to false"
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
    compile_needs_blocks,
    reshard_needs_shards,
)


def without_effect(config: JobConfig, *, experts: bool) -> list[str]:
    """Keys that a recipe changes and that do nothing on its mesh or its model, each with the reason.

    experts: whether the model has some.
    """
    parallelism, defaults = config.parallelism, type(config.parallelism)()
    needs: Iterable[tuple[str, Iterable[str]]] = (
        ("tensor_parallel_degree", ("disable_loss_parallel",)),
        ("context_parallel_degree", ("context_parallel_rotate_method",)),
        (
            "pipeline_parallel_degree",
            (
                "pipeline_parallel_schedule",
                "pipeline_parallel_schedule_csv",
                "pipeline_parallel_microbatch_size",
                "pipeline_parallel_layers_per_stage",
                "module_fqns_per_model_part",
            ),
        ),
    )
    idle = [
        f"parallelism.{key} = {getattr(parallelism, key)} has no effect while parallelism.{degree} = 1"
        for degree, keys in needs
        for key in keys
        if getattr(parallelism, degree) == 1 and getattr(parallelism, key) != getattr(defaults, key)
    ]
    if not config.compile.enable and config.compile.backend != type(config.compile)().backend:
        idle.append(f"compile.backend = {config.compile.backend} has no effect while compile.enable = false")
    moe, untouched = config.moe, type(config.moe)()
    if not experts:
        changed = {f"moe.{key}": value for key, value in vars(moe).items() if value != getattr(untouched, key)}
        if config.debug.moe_force_load_balance:
            changed["debug.moe_force_load_balance"] = True
        idle += [f"{key} = {value} has no effect on a model without experts" for key, value in changed.items()]
    elif moe.overlap_halves and parallelism.expert_parallel_degree == 1:
        idle.append("moe.overlap_halves = True has no effect while parallelism.expert_parallel_degree = 1")
    return idle + _checkpoint_keys_without_effect(config.checkpoint) + _fault_keys_without_effect(config.faults)


def _fault_keys_without_effect(section: Faults) -> list[str]:
    defaults = Faults()
    judged = section.loss_spike_sigmas or section.grad_norm_spike_sigmas
    needs: Iterable[tuple[bool, str, Iterable[str]]] = (
        (section.skip_nonfinite, "faults.skip_nonfinite = false", ("max_in_a_row", "then")),
        (
            bool(judged),
            "faults.loss_spike_sigmas and faults.grad_norm_spike_sigmas are 0",
            ("warmup_steps",),
        ),
    )
    return [
        f"faults.{key} = {getattr(section, key)} has no effect while {reason}"
        for has_effect, reason, keys in needs
        for key in keys
        if not has_effect and getattr(section, key) != getattr(defaults, key)
    ]


def _checkpoint_keys_without_effect(section: Checkpoint) -> list[str]:
    defaults = Checkpoint()
    saving = (
        "interval",
        "interval_minutes",
        "keep_latest_k",
        "async_mode",
        "strict",
        "load_step",
        "last_save_model_only",
    )
    needs: Iterable[tuple[bool, str, Iterable[str]]] = (
        (section.enable, "checkpoint.enable = false", saving),
        (bool(section.initial_load_path), "checkpoint.initial_load_path is empty", ("initial_load_model_only",)),
    )
    return [
        f"checkpoint.{key} = {getattr(section, key)} has no effect while {reason}"
        for has_effect, reason, keys in needs
        for key in keys
        if not has_effect and getattr(section, key) != getattr(defaults, key)
    ]


def _exchanges_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _rounded_up(number: float) -> float:
    """To three digits, so that what a message calls valid is."""
    scale = 10.0 ** (2 - floor(log10(number)))
    return ceil(number * scale) / scale


def _nearest_multiples(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)
