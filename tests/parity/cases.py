"""The meshes that are held to the single process, each technique alone and composed with the others.

Every case trains on packed documents under a document mask, with labels taken out so that samples weigh differently.
"""

from pathlib import Path
from typing import Any

from tests.parity.runner import Case

_KEYS = {
    "replicate": "parallelism.data_parallel_replicate_degree",
    "shard": "parallelism.data_parallel_shard_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "method": "parallelism.context_parallel_rotate_method",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "csv": "parallelism.pipeline_parallel_schedule_csv",
    "microbatch": "parallelism.pipeline_parallel_microbatch_size",
    "layers_per_stage": "parallelism.pipeline_parallel_layers_per_stage",
    "parts": "parallelism.module_fqns_per_model_part",
    "reshard": "parallelism.fsdp_reshard_after_forward",
    "gathered_logits": "parallelism.disable_loss_parallel",
    "local": "training.local_batch_size",
    "offload": "training.enable_cpu_offload",
    "compiled": "compile.enable",
    "backend": "compile.backend",
    "loss_chunks": "training.loss_chunks",
    "ac": "activation_checkpoint.mode",
    "kept": "activation_checkpoint.selective_ac_option",
    "gathered": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "ahead": "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
    "ep": "parallelism.expert_parallel_degree",
    "halves": "moe.overlap_halves",
}
_WORDS = {
    "model.converters": "float8",
    "training.local_batch_size": "micro-batches of {}",
    "quantize.linear.float8.filter_fqns": "but for the output",
    "quantize.linear.float8.emulate": "emulated",
    "quantize.grouped_mm.float8.fqns": "of experts",
    "quantize.grouped_mm.float8.emulate": "emulated",
    "quantize.linear.float8.recipe_name": "{}",
    "moe.capacity_factor": "capacity {}",
    "debug.moe_force_load_balance": "in turn",
    "training.global_batch_size": "batch {}",
    "data.document_mask": "no document mask",
}
OP: dict[str, Any] = {"ac": "selective", "kept": "op"}
FULL: dict[str, Any] = {"ac": "full"}
LLAMA, QWEN, GPT = "DEEP_LLAMA/untied", "DEEP_QWEN/untied", "SMALL_GPT/untied"
MOE, SHARED = "MOE/routed", "MOE/shared"
_ODD = {"training.global_batch_size": 7}  # no rank count but 1 and 7 divides it
_FEW = {"training.global_batch_size": 2}
_NO_MASK = {"data.document_mask": False}  # attention then takes kernels of its own
_CSV = str(Path(__file__).parent / "pp2.csv")
_PARTS = [["tok_embeddings", "layers.0"], [f"layers.{index}" for index in range(1, 8)] + ["norm", "output"]]


# All that balances, strong enough to show; biases that move by several scores' distances.
_BALANCED = {"moe.aux_loss_coeff": 0.02, "moe.z_loss_coeff": 0.001, "moe.bias_update_rate": 0.01}
_CAPACITY = _BALANCED | {"moe.capacity_factor": 1.0}


def case(ranks: int, model: str = LLAMA, recipe: dict[str, Any] | None = None, **overrides: Any) -> Case:
    words = [f"{key} {value}" for key, value in overrides.items() if key not in ("csv", "parts", "backend")]
    if "csv" in overrides or "parts" in overrides:
        words.append("as named" if "parts" in overrides else "from a file")
    words += [_WORDS.get(key, "{}").format(value) for key, value in (recipe or {}).items() if key not in _BALANCED]
    words = words or [f"shard {ranks}"]
    named = {_KEYS[key]: value for key, value in overrides.items()}
    return Case(", ".join(words), ranks, named, model, recipe or {})


DATA = [
    case(1, QWEN, recipe=_ODD, local=2, offload=True),
    case(2),
    case(3, recipe=_ODD),
    case(4, recipe=_FEW),
    case(2, reshard="never", local=1, **FULL),
    case(2, reshard="always", local=2),
    case(2, QWEN, replicate=2, shard=1, **OP),
    case(2, model="DEEP_LLAMA/tied", replicate=2, shard=1, local=1),
    case(4, QWEN, recipe=_ODD, replicate=2, shard=2, reshard="never", local=1, loss_chunks=3),
    case(8, QWEN, recipe=_ODD, replicate=2, shard=4, local=1),
]
TENSOR = [
    case(2, tp=2),
    case(2, "DEEP_QWEN/tied", tp=2, loss_chunks=3, **OP),
    case(2, "DEEP_LLAMA/tied", tp=2, gathered_logits=True),
    case(4, tp=4, **FULL),
    case(4, QWEN, recipe=_ODD, shard=2, tp=2, local=2, loss_chunks=2),
    case(4, "DEEP_LLAMA/tied", shard=2, tp=2, reshard="never", local=1, **OP),
    case(8, replicate=2, shard=2, tp=2),
    case(8, QWEN, shard=2, tp=4),
]
CONTEXT = [
    case(2, cp=2),
    case(2, cp=2, method="alltoall"),
    case(4, QWEN, cp=4),
    case(4, recipe=_ODD, shard=2, cp=2, local=2, loss_chunks=2, **OP),
    case(4, QWEN, cp=2, tp=2, method="alltoall", loss_chunks=3, **OP),
    case(4, "SPEC/tiny", cp=4, method="alltoall"),  # twice as many ranks as key heads
    case(8, cp=8, method="alltoall"),
    case(8, cp=4, tp=2, method="alltoall"),
    case(8, QWEN, shard=2, cp=2, tp=2),
    case(8, replicate=2, shard=2, cp=2),
    case(2, recipe=_NO_MASK, cp=2),
    case(2, QWEN, recipe=_NO_MASK, cp=2, method="alltoall"),
    case(8, QWEN, replicate=2, shard=1, cp=2, tp=2),
]
PIPELINE = [
    *(case(2, pp=2, schedule=name) for name in ("1F1B", "GPipe", "LoopedBFS")),
    case(2, pp=2, schedule="PipelineScheduleMulti", csv=_CSV),
    case(2, pp=2, parts=str(_PARTS).replace("'", '"'), microbatch=2),
    case(2, QWEN, pp=2, schedule="Interleaved1F1B", layers_per_stage=2),
    case(2, recipe=_FEW, pp=2, schedule="DualPipeV", **FULL),
    case(3, QWEN, recipe=_ODD, pp=3, **FULL),
    case(4, pp=4, schedule="ZBVZeroBubble", loss_chunks=3),
    case(4, QWEN, recipe=_ODD, shard=2, pp=2, schedule="ZBVZeroBubble", loss_chunks=2, **FULL),
    case(2, pp=2, schedule="InterleavedZeroBubble", offload=True),
    case(4, pp=2, tp=2, schedule="Interleaved1F1B", loss_chunks=2, **OP),
    case(4, QWEN, recipe=_ODD, pp=2, cp=2, method="alltoall", loss_chunks=2, **OP),
    case(8, shard=2, pp=2, tp=2, schedule="Interleaved1F1B"),
    case(8, QWEN, recipe=_ODD, shard=2, pp=2, cp=2, schedule="ZBVZeroBubble"),
    case(8, pp=2, cp=2, tp=2, schedule="InterleavedZeroBubble"),
    case(8, QWEN, shard=2, pp=4, schedule="DualPipeV"),
    case(8, replicate=2, shard=2, pp=2, offload=True),
    case(8, replicate=2, shard=1, pp=2, tp=2, schedule="GPipe"),
    case(8, QWEN, replicate=2, shard=1, pp=2, cp=2, method="alltoall"),
]
COMPILED = [
    case(2, compiled=True, backend="aot_eager"),
    case(2, compiled=True, tp=2, backend="aot_eager", loss_chunks=2, **OP),
    case(2, QWEN, compiled=True, cp=2, backend="aot_eager", **FULL),
    case(2, recipe=_NO_MASK, compiled=True, cp=2, backend="aot_eager", ac="memory_budget"),
    case(2, compiled=True, pp=2, backend="aot_eager", **OP),
]
OUTSIDE = [
    case(2, GPT, tp=2, **OP),
    case(2, GPT, pp=2, schedule="Interleaved1F1B"),
    case(8, GPT, shard=2, pp=2, tp=2, schedule="ZBVZeroBubble"),
]


def mixture(ranks: int, model: str = MOE, recipe: dict[str, Any] | None = None, **overrides: Any) -> Case:
    return case(ranks, model, _BALANCED | (recipe or {}), **overrides)


EXPERTS = [
    mixture(3, recipe=_ODD, local=1),
    mixture(1, SHARED, recipe=_CAPACITY, local=2),
    mixture(2, ep=2),
    mixture(2, ep=2, halves=True, **FULL),
    mixture(2, SHARED, recipe=_CAPACITY, ep=2, loss_chunks=2, **OP),
    mixture(4, ep=4),
    mixture(6, recipe=_ODD, ep=2, local=1),  # four experts over three ranks: rows of each
    mixture(4, replicate=2, shard=2, ep=2),
    mixture(8, recipe=_ODD, replicate=2, shard=4, ep=2, local=1),
    mixture(2, cp=2, ep=2, **OP),
    mixture(4, recipe=_CAPACITY, shard=2, cp=2, ep=2),
    mixture(2, tp=2),
    mixture(2, SHARED, recipe=_CAPACITY, tp=2, **OP),
    mixture(4, SHARED, shard=2, tp=2, ep=2),
    mixture(4, cp=2, tp=2, ep=2, **FULL),
    mixture(4, SHARED, recipe=_ODD, shard=2, pp=2, ep=2, schedule="Interleaved1F1B", **OP),
    mixture(8, SHARED, shard=2, cp=2, tp=2, ep=4),
    mixture(8, shard=2, pp=2, cp=2, ep=4, halves=True),
    mixture(8, replicate=2, shard=1, cp=2, tp=2, ep=2),
    mixture(2, SHARED, ep=2, offload=True, local=2),
    mixture(2, SHARED, ep=2, compiled=True, backend="aot_eager", **OP),
    mixture(2, SHARED, pp=2, schedule="DualPipeV"),
    mixture(2, recipe={"debug.moe_force_load_balance": True}, cp=2, ep=2),
    mixture(2, "MOE_GPT/small", ep=2),
]
# What those above hold in part each: for `make parity` alone.
THOROUGH = [
    case(4, replicate=2, shard=1, tp=2),
    case(4, QWEN, shard=2, cp=2, method="alltoall", **FULL),
    case(4, replicate=2, shard=1, cp=2),
    case(4, QWEN, shard=2, pp=2, schedule="LoopedBFS", reshard="always", microbatch=2),
    case(4, QWEN, replicate=2, shard=1, pp=2, schedule="LoopedBFS"),
    case(4, QWEN, pp=2, tp=2, gathered_logits=True),
    case(4, compiled=True, pp=2, tp=2, backend="aot_eager", **OP),
    case(4, GPT, cp=2, tp=2, method="alltoall"),
    mixture(4, ep=2),
    mixture(4, SHARED, cp=4, ep=2, method="alltoall"),
    mixture(4, shard=2, pp=2, ep=2, reshard="always", microbatch=2),
    mixture(4, recipe=_CAPACITY, pp=2, tp=2),
    mixture(4, "MOE_GPT/small", shard=2, pp=2, ep=2),
    mixture(3, recipe=_ODD, ep=1, reshard="never", local=2),
    case(2, offload=True, local=2),
    case(4, replicate=2, shard=2, local=1),
    case(2, QWEN, tp=2, local=2),
    case(2, gathered_logits=True, tp=2),
    case(4, QWEN, cp=4, method="alltoall"),
    case(4, cp=2, tp=2),
    case(2, pp=2, schedule="Interleaved1F1B", layers_per_stage=1),
    case(4, pp=4, schedule="1F1B"),
    case(4, shard=2, pp=2, reshard="always"),
    case(4, pp=2, cp=2, schedule="DualPipeV"),
    mixture(4, shard=2, pp=2, ep=2, schedule="ZBVZeroBubble"),
    mixture(4, "MOE_GPT/small", cp=2, tp=2, ep=2),
    case(1, local=1),
    case(4, QWEN),
    *(case(2, QWEN, pp=2, schedule=name) for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")),
    case(2, pp=2, schedule="Interleaved1F1B"),
    case(2, GPT, local=1),
    case(2, GPT, cp=2),
    mixture(2),
    mixture(2, SHARED, recipe=_ODD, ep=2, local=1),
    mixture(2, replicate=2, shard=1, local=2),
    mixture(2, pp=2),
    mixture(2, SHARED, tp=2, compiled=True, backend="aot_eager"),
    mixture(2, "MOE_GPT/small", tp=2),
]
CASES = [*DATA, *TENSOR, *CONTEXT, *PIPELINE, *COMPILED, *OUTSIDE, *EXPERTS]

# Float8 rounds to 3 bits, with scales of each micro-batch: the same ones on the single process.
_F8 = {
    "model.converters": ["quantize.linear.float8"],
    "quantize.linear.float8.filter_fqns": ["output"],
    "quantize.linear.float8.emulate": True,
}
_TENSORWISE = _F8 | {"training.local_batch_size": 1}
_ROWWISE = _TENSORWISE | {"quantize.linear.float8.recipe_name": "rowwise"}
_HIGH = _TENSORWISE | {"quantize.linear.float8.recipe_name": "rowwise_with_gw_hp"}
FLOAT8 = [
    case(2, recipe=_TENSORWISE, **OP),
    case(2, recipe=_ROWWISE),
    case(2, recipe=_HIGH, **FULL),
    case(2, recipe=_TENSORWISE, gathered=True),
    case(2, recipe=_TENSORWISE, gathered=True, ahead=True),
    case(2, recipe=_TENSORWISE, tp=2),
    case(2, recipe=_ROWWISE, tp=2, loss_chunks=2),
    case(2, recipe=_TENSORWISE, pp=2),
    case(2, recipe=_TENSORWISE, compiled=True, backend="aot_eager"),
    case(4, recipe=_TENSORWISE, shard=2, tp=2, gathered=True, ahead=True),  # else scales are of a rank's part
    case(2, recipe=_HIGH, cp=2),
    case(4, recipe=_TENSORWISE, shard=2, pp=2),
]

# Experts in float8: of a matrix's gradient a scale is that of an expert's rows in a micro-batch, wherever those are.
_GROUPED = {
    "model.converters": ["quantize.grouped_mm.float8"],
    "quantize.grouped_mm.float8.fqns": ["experts"],
    "quantize.grouped_mm.float8.emulate": True,
    "training.local_batch_size": 2,
}
_GROUPED_FEW = _GROUPED | {"training.global_batch_size": 4}
FLOAT8_EXPERTS = [
    mixture(2, recipe=_GROUPED, ep=2, local=1, **OP),
    mixture(4, recipe=_GROUPED_FEW, shard=4, ep=2, local=1),
    mixture(2, SHARED, recipe=_GROUPED | {"moe.capacity_factor": 1.0}, ep=2, local=1, halves=True),
    mixture(2, recipe=_GROUPED, tp=2, **FULL),
    mixture(2, recipe=_GROUPED, cp=2),
    mixture(2, SHARED, recipe=_GROUPED, pp=2, compiled=True, backend="aot_eager"),
    mixture(4, recipe=_GROUPED_FEW, shard=2, tp=2, ep=2, local=1),
]

# bfloat16 rounds to 3 digits, elsewhere on every mesh: held to the single process in bfloat16.
_BF16 = {"training.mixed_precision_param": "bfloat16"}
BFLOAT16 = [
    case(2, recipe=_BF16),
    case(2, recipe=_BF16, tp=2),
    case(2, QWEN, recipe=_BF16, cp=2),
    case(2, recipe=_BF16, pp=2),
    case(4, QWEN, recipe=_BF16, pp=2, tp=2, schedule="Interleaved1F1B"),
]
