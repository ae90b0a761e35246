"""Each parallelism technique alone: its overrides of the recipe, and the fewest bytes that a rank must send in a step.

Minima, in bytes. P parameters, P' those of the last FSDP unit, which stay gathered between forward and backward (small
units are joined);
B batch of the step, S sequence, D width, V micro-batches; L blocks, H and K query and key heads of size E, float32.

    FSDP         (n-1)/n V (3P - P')             gather forward, gather backward, reduce-scatter gradients
    FSDP never   (n-1)/n 2P                      gather once, reduce-scatter once, whatever the micro-batches
    DDP          (n-1)/n 2P                      all-reduce gradients once
    HSDP         (s-1)/s V (3P - P') + 2 (r-1)/r P/s    on r replicas of s shards
    TP           (n-1)/n 4 ((8L + 4) BSD + 2 (2L + 1) D + 6 BS)
                 a block gathers and scatters twice, embedding and output once, backward as forward; norm weights'
                 gradients are all-reduced; the loss all-reduces three numbers a token
    CP allgather (n-1)/n 4 L 4 BSKE              keys and values gathered forward, their gradients scattered
    CP alltoall  (n-1)/n 4 L 4 BS (H + K) E / n  q, k, v to heads and the result back, backward as forward
    PP           4 (B/V) S D V c                 forward out of and backward into each of the c cuts between ranks;
                 a rank's own are the ends of cuts that it sends from
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from traffic import Call

from torchtitan_lite.distributed.data_parallel import gathered_units
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.preflight import JobPlan, plan_job

RECIPE = Path(__file__).parent.parent / "train_configs" / "llama3_debug.toml"
SEQ_LEN, ROWS = 128, 4  # of a rank's share of a step

# Eight blocks, so that two stages a rank fit on four ranks; fewer key heads, so that the formulas tell them from H.
SHAPE = replace(LLAMA3.flavors["debugmodel"], n_layers=8, n_kv_heads=8)
SPEC = replace(LLAMA3, flavors={"benchmark": SHAPE})


@dataclass(frozen=True)
class Part:
    """Collectives with a minimum of their own. minimum: bytes of the rank that is second argument."""

    formula: str
    minimum: Callable[[JobPlan, int], float]
    holds: Callable[[Call], bool] = lambda call: True
    name: str = ""


@dataclass(frozen=True)
class Technique:
    """overrides: of the recipe's [parallelism]; `{n}` is the number of ranks, `{half}` its half. microbatches: of a
    data-parallel rank."""

    name: str
    overrides: dict[str, str]
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = (2, 4)
    microbatches: int = 1

    def plan(self, ranks: int) -> JobPlan:
        batch = ROWS * ranks
        settings = {"training.seq_len": SEQ_LEN, "training.global_batch_size": batch}
        settings |= {"training.local_batch_size": batch if self.microbatches == 1 else ROWS // self.microbatches}
        settings |= {"model.spec": "parallel_techniques:SPEC", "model.flavor": "benchmark"}
        texts = {f"parallelism.{key}": value.format(n=ranks, half=ranks // 2) for key, value in self.overrides.items()}
        plan = plan_job(RECIPE, [f"--{key}={value}" for key, value in {**settings, **texts}.items()], ranks)
        assert plan.batch.microbatches * plan.batch.microbatch_size * plan.batch.batch_ranks == batch, "empty rows"
        return plan


def volume(parameters: int = SHAPE.parameter_count()) -> float:
    return 4.0 * parameters


def last_unit() -> float:
    with torch.device("meta"):
        model = SPEC.build(SHAPE)
    *_, last = gathered_units(model, SPEC.plan(SHAPE).fsdp_units, "float32")
    return volume(sum(parameter.numel() for module in last for parameter in module.parameters()))


LAST_UNIT = last_unit()


def over(n: int) -> float:
    return (n - 1) / n


def hidden(plan: JobPlan) -> float:
    """Bytes of BSD numbers."""
    return 4.0 * plan.tokens_per_step * SHAPE.dim


def fsdp_bytes(plan: JobPlan, _: int) -> float:
    shards, replicas = plan.dims.dp_shard * plan.dims.cp, plan.dims.dp_replicate
    shared = over(shards) * (3 * volume() - LAST_UNIT) * plan.batch.microbatches
    return shared + 2 * over(replicas) * volume() / shards


def reduced_once_bytes(plan: JobPlan, _: int) -> float:
    return over(plan.dims.world_size) * 2 * volume()


def tensor_bytes(plan: JobPlan, _: int) -> float:
    norms, losses = 2 * 4.0 * (2 * SHAPE.n_layers + 1) * SHAPE.dim, 2 * 3 * 4.0 * plan.tokens_per_step
    return over(plan.dims.tp) * ((8 * SHAPE.n_layers + 4) * hidden(plan) + norms + losses)


def gathered_keys_bytes(plan: JobPlan, _: int) -> float:
    return over(plan.dims.cp) * 4 * SHAPE.n_layers * hidden(plan) * SHAPE.n_kv_heads / SHAPE.n_heads


def exchanged_heads_bytes(plan: JobPlan, _: int) -> float:
    heads = 1 + SHAPE.n_kv_heads / SHAPE.n_heads
    return over(plan.dims.cp) * 4 * SHAPE.n_layers * hidden(plan) * heads / plan.dims.cp


def pipeline_bytes(plan: JobPlan, rank: int) -> float:
    assert plan.pipeline is not None
    owner = plan.pipeline.rank_of_stage
    cuts = [pair for pair in pairwise(owner) if pair[0] != pair[1]]
    # Forward from the cut's left end, backward from its right one.
    return hidden(plan) * sum(pair.count(rank) for pair in cuts)


FSDP = Part("(n-1)/n V (3P - P')", fsdp_bytes)
HSDP = replace(FSDP, formula="(s-1)/s V (3P - P') + 2 (r-1)/r P/s")
ONCE = Part("(n-1)/n 2P", reduced_once_bytes)
# Around attention the model calls functional ops, FSDP does not.
PARAMETERS = replace(FSDP, name="its parameters", holds=lambda call: not call.functional)
ACROSS_STAGES = Part("4 BSD x own ends of cuts", pipeline_bytes)


def context(method: str, formula: str, minimum: Callable[[JobPlan, int], float]) -> Technique:
    overrides = {"context_parallel_degree": "{n}", "context_parallel_rotate_method": method}
    return Technique(f"CP {method}", overrides, (Part(formula, minimum, lambda call: call.functional), PARAMETERS))


def pipeline(schedule: str) -> Technique:
    overrides = {"pipeline_parallel_degree": "{n}", "pipeline_parallel_schedule": schedule}
    return Technique(f"PP {schedule}", overrides, (ACROSS_STAGES,))


NEVER, DDP = {"fsdp_reshard_after_forward": "never"}, {"data_parallel_replicate_degree": "{n}"}
REPLICAS = {"data_parallel_replicate_degree": "{half}"}
TECHNIQUES = (
    Technique("FSDP", {}, (FSDP,)),
    Technique("FSDP never", NEVER, (ONCE,)),
    Technique("FSDP never, 2 micro-batches", NEVER, (ONCE,), microbatches=2),
    Technique("DDP", DDP, (ONCE,)),
    Technique("DDP, 2 micro-batches", DDP, (ONCE,), microbatches=2),
    Technique("HSDP 2 x 2", REPLICAS, (HSDP,), ranks=(4,)),
    Technique("HSDP 2 x 2, 2 micro-batches", REPLICAS, (HSDP,), ranks=(4,), microbatches=2),
    Technique(
        "TP",
        {"tensor_parallel_degree": "{n}"},
        (Part("(n-1)/n 4 ((8L+4) BSD + 2 (2L+1) D + 6 BS)", tensor_bytes),),
    ),
    context("allgather", "(n-1)/n 4L 4 BSKE", gathered_keys_bytes),
    context("alltoall", "(n-1)/n 4L 4 BS (H+K) E/n", exchanged_heads_bytes),
    *map(pipeline, ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")),
)
