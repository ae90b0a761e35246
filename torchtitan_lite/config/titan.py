"""What becomes of each key of TorchTitan 0.2.0 to 0.2.2: the one table that moving a recipe over goes by.

Keys and defaults are those of torchtitan/config/job_config.py of 0.2.2 (github.com/pytorch/torchtitan); what 0.2.0 and
0.2.1 had besides is marked. An entry's functions get the value and `Old`, the whole old recipe by dotted names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Old = Mapping[str, Any]
Test = Callable[[Any, Old], bool]


def always(value: Any, old: Old) -> bool:
    return True


def never(value: Any, old: Old) -> bool:
    return False


def equals(*values: Any) -> Test:
    return lambda value, old: value in values


@dataclass(frozen=True)
class Kept:
    """The same name, the same meaning."""


@dataclass(frozen=True)
class Renamed:
    """The same value under another name."""

    to: str


@dataclass(frozen=True)
class Changed:
    """The name is here too, and the value means something else `when` it is such a one.

    to: what takes its place, {key: value}; None where the value stays. loses: whether the run then is another.
    """

    told: str
    when: Test = always
    to: Callable[[Any, Old], dict[str, Any]] | None = None
    loses: bool = False


@dataclass(frozen=True)
class Dropped:
    """There is no such key here. unless: values without which nothing is lost."""

    why: str
    unless: Test = never


Entry = Kept | Renamed | Changed | Dropped

_OUTPUTS = ("./outputs", "outputs", "./torchtitan/outputs")
_CONVERTERS = ("quantize.linear.float8", "quantize.grouped_mm.float8")
_STATES = ("optimizer", "dataloader", "train_state")
_PARTS = {"moe": "feed_forward", "shared_experts": "shared"}
# Flavors that differ by the kernel of attention, and mask documents.
_MASKED = ("_flex_attn", "_varlen_attn", "_flex", "_varlen")


def _dump_folder(value: Any, old: Old) -> dict[str, Any]:
    return {} if value in _OUTPUTS else {"job.dump_folder": value}


def _flavor(value: Any, old: Old) -> dict[str, Any]:
    suffix = next(suffix for suffix in _MASKED if value.endswith(suffix))
    return {"model.flavor": value.removesuffix(suffix), "data.document_mask": True}


def _is_masked(value: Any, old: Old) -> bool:
    return isinstance(value, str) and value.endswith(_MASKED)


def _converters(value: Any, old: Old) -> dict[str, Any]:
    return {"model.converters": [name for name in value if name in _CONVERTERS]}


def _holds_others(known: tuple[str, ...]) -> Test:
    return lambda value, old: isinstance(value, list) and not set(map(str, value)) <= set(known)


def _tokenizer(value: Any, old: Old) -> dict[str, Any]:
    return {"model.tokenizer_path": value} if str(value).endswith(".model") else {}


def _excluded(value: Any, old: Old) -> dict[str, Any]:
    key, section = "checkpoint.exclude_from_loading", "checkpoint.initial_load_"
    counts = old.get(section + "path") and not old.get(section + "model_only", True)
    kept = [item for item in value if item in _STATES]
    return {key: kept} if counts and kept else {}


def _is_excluded_in_vain(value: Any, old: Old) -> bool:
    return isinstance(value, list) and _excluded(value, old) != {"checkpoint.exclude_from_loading": value}


def _routers_left_out(value: Any, old: Old) -> dict[str, Any]:
    kept = [name for name in value if "router" not in name]
    return {"activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": kept} if kept else {}


def _names_routers(value: Any, old: Old) -> bool:
    return isinstance(value, list) and any("router" in str(name) for name in value)


def _module_here(name: str) -> str:
    if name == "auto_filter_small_kn":
        return "auto_filter_small"
    return ".".join(_PARTS.get(part, part) for part in name.split("."))


def _is_linear_here(name: str) -> bool:
    """Of a mixture only the shared expert is; `moe` as such would be all feed-forwards of a dense model."""
    return "router" not in name and ("moe" not in name.split(".") or "shared_experts" in name)


def _modules(key: str, counts: Callable[[str], bool]) -> Callable[[Any, Old], dict[str, Any]]:
    """Names of modules there as they are here, those that count: a list, where a string has them too."""

    def here(value: Any, old: Old) -> dict[str, Any]:
        names = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
        return {key: [_module_here(name) for name in names if name and counts(name)]}

    return here


def _names_modules_otherwise(key: str, counts: Callable[[str], bool]) -> Test:
    here = _modules(key, counts)

    def test(value: Any, old: Old) -> bool:
        names = isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        return names and here(value, old) != {key: value}

    return test


def _is_left_alone(converter: str) -> Test:
    def test(value: Any, old: Old) -> bool:
        converters = old.get("model.converters", [])
        return isinstance(converters, list) and converter not in converters

    return test


def _accumulates_under_a_pipeline(value: Any, old: Old) -> bool:
    staged = old.get("parallelism.pipeline_parallel_degree", 1) != 1
    return bool(staged and old.get("training.global_batch_size", -1) != -1)


_DEGREE_OF_EXPERTS = "parallelism.expert_parallel_degree"
_NOT_IN_FLOAT8 = "quantize.linear.float8.filter_fqns"
_EXPERTS_IN_FLOAT8 = "quantize.grouped_mm.float8.fqns"
_NO_HUGGING_FACE = "weights in Hugging Face's format are not read or written yet"
_MAPPED = "samples come from shards mapped into memory, without worker processes"
_HELD_OUT = "validation is on documents held out of the corpus; data.validation_fraction says how many"
_OWN_KEYS = "a recipe holds no keys of your own; a model from outside has its sizes as flavors of model.spec"
_NO_MX = 'there is no MXFP8 for linear layers; "quantize.linear.float8" in model.converters multiplies in float8'
_NO_GROUPED_MX = 'there is no MXFP8 for experts; "quantize.grouped_mm.float8" in model.converters multiplies in float8'
_TORCHFT = "a key of TorchFT, see fault_tolerance.enable"

# The same names with the same meaning, by section. Those not in the schema are not built yet.
_KEPT = {
    "job": "description",
    "profiling": "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup "
    "enable_memory_snapshot save_memory_snapshot_folder",
    "metrics": "log_freq enable_tensorboard disable_color_printing save_tb_folder",
    "model": "name",
    "optimizer": "name lr beta1 beta2 eps weight_decay implementation",
    "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
    "training": "local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload mixed_precision_param "
    "mixed_precision_reduce gc_freq",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
    "tensor_parallel_degree disable_loss_parallel enable_async_tensor_parallel pipeline_parallel_degree "
    "module_fqns_per_model_part pipeline_parallel_schedule pipeline_parallel_schedule_csv context_parallel_degree "
    "expert_parallel_comm_backend",
    "checkpoint": "enable folder interval initial_load_model_only async_mode keep_latest_k load_step",
    "activation_checkpoint": "mode selective_ac_option memory_budget",
    "compile": "enable components backend",
    "quantize.linear.float8": "enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp recipe_name "
    "emulate",
    "comm": "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder",
    "validation": "enable local_batch_size",
    "debug": "seed deterministic moe_force_load_balance",
}

_OTHERS: dict[str, Entry] = {
    "job.dump_folder": Changed(
        "here the folder of one run, from which it resumes, so that two recipes cannot share it; without the key it is "
        "outputs/ and the recipe's name",
        to=_dump_folder,
    ),
    "job.config_file": Dropped("the recipe is the first argument of a command", always),
    "job.print_config": Dropped("config.json always has it, and `torchtitan-lite config show` prints it", always),
    "job.save_config_file": Dropped("config.json in the run folder always has it", always),
    "job.custom_config_module": Dropped(_OWN_KEYS, equals("")),
    "metrics.save_for_all_ranks": Dropped("one set of numbers is written, for all ranks together", equals(False)),
    "metrics.enable_wandb": Dropped(
        "there is no Weights & Biases; metrics.jsonl and TensorBoard have the numbers", equals(False)
    ),
    "model.flavor": Changed(
        "there is no flavor for a kernel of attention; that documents do not see each other is data.document_mask",
        when=_is_masked,
        to=_flavor,
    ),
    "model.converters": Changed(
        'here there are "quantize.linear.float8" and "quantize.grouped_mm.float8"',
        when=_holds_others(_CONVERTERS),
        to=_converters,
        loses=True,
    ),
    "model.tokenizer_path": Changed(
        "here a sentencepiece .model file, there a folder of Hugging Face's; without it one is trained on the text",
        to=_tokenizer,
        loses=True,
    ),
    "model.hf_assets_path": Dropped(
        "its tokenizer.json is not read: name a sentencepiece .model file in model.tokenizer_path, or one is trained "
        "on the text"
    ),
    "model.print_after_conversion": Dropped("the log always has the plan of the model as a table", always),
    "optimizer.early_step_in_backward": Dropped(
        "gradients are clipped by their norm over the whole model, known when the backward has ended", equals(False)
    ),
    "training.dataset": Changed(
        "data sets of Hugging Face are not read: without the key the source files of Python's standard library are "
        'trained on; for text of your own set dataset = "text" and dataset_path',
        when=lambda value, old: value not in ("python_stdlib", "text", "mixture"),
        to=lambda value, old: {},
        loses=True,
    ),
    "training.dataset_path": Changed(
        'here a file or folder of UTF-8 text, a document each, and with dataset = "text" only; there a data set of '
        "Hugging Face",
        when=lambda value, old: old.get("training.dataset") != "text",
        to=lambda value, old: {},
        loses=True,
    ),
    "training.dtype": Dropped(
        'master weights are always float32; optimizer.state_dtype = "bfloat16" makes the optimizer smaller',
        equals("float32"),
    ),
    "training.gc_debug": Dropped("garbage of reference cycles is not traced", equals(False)),
    "training.dataloader.num_workers": Dropped(_MAPPED, always),
    "training.dataloader.persistent_workers": Dropped(_MAPPED, always),
    "training.dataloader.pin_memory": Dropped(_MAPPED, always),
    "training.dataloader.prefetch_factor": Dropped(_MAPPED, always),
    "parallelism.pipeline_parallel_microbatch_size": Changed(
        "here all micro-batches of a step go through one schedule; there those of one local_batch_size, one "
        "accumulation after the other",
        when=_accumulates_under_a_pipeline,
    ),
    "parallelism.pipeline_parallel_layers_per_stage": Changed(
        "here layers alone count, and the last stage takes what is left; there embedding and output count as "
        "pipeline_parallel_{first,last}_stage_less_layers"
    ),
    "parallelism.pipeline_parallel_first_stage_less_layers": Dropped(
        "the automatic split weighs the embedding by its FLOPs", always
    ),
    "parallelism.pipeline_parallel_last_stage_less_layers": Dropped(
        "the automatic split weighs norm and output by their FLOPs", always
    ),
    "parallelism.pipeline_parallel_expert_parallel_overlap": Dropped(
        "moe.overlap_halves lets experts compute while tokens travel, on every schedule", always
    ),
    "parallelism.context_parallel_load_balancer": Dropped(
        "allgather always balances its pieces of the sequence", always
    ),
    "parallelism.context_parallel_rotate_method": Changed(
        "here ranks exchange sequence for heads (Ulysses), and context_parallel_degree must divide the heads that a "
        "rank holds; there they pass keys and values around",
        when=equals("alltoall"),
    ),
    _DEGREE_OF_EXPERTS: Changed(
        "here it must divide data_parallel_shard_degree x context_parallel_degree; there it borrows ranks of "
        "tensor_parallel_degree too",
        when=lambda value, old: value != 1 and old.get("parallelism.tensor_parallel_degree", 1) != 1,
    ),
    "parallelism.expert_tensor_parallel_degree": Changed(
        "here experts are not cut: tensor-parallel ranks take whole ones",
        when=lambda value, old: value != 1,
        to=lambda value, old: {"parallelism.expert_tensor_parallel_degree": 1},
    ),
    "checkpoint.initial_load_path": Changed(
        "here a checkpoint of torchtitan_lite: those of TorchTitan (DCP) and Hugging Face are not read, and the start "
        "says so",
        loses=True,
    ),
    "checkpoint.initial_load_in_hf": Dropped(_NO_HUGGING_FACE, equals(False)),
    "checkpoint.initial_load_in_hf_quantized": Dropped(_NO_HUGGING_FACE, equals(False)),
    "checkpoint.last_save_in_hf": Dropped(_NO_HUGGING_FACE, equals(False)),
    "checkpoint.last_save_model_only": Changed(
        "the default there, false here: a run cannot be continued from such a last checkpoint", when=equals(True)
    ),
    "checkpoint.export_dtype": Dropped("weights are saved in float32, as they are trained", equals("float32")),
    "checkpoint.exclude_from_loading": Changed(
        "here `optimizer`, `dataloader` and `train_state`, of an initial_load_path with initial_load_model_only = "
        "false; the learning rate follows from the step",
        when=_is_excluded_in_vain,
        to=_excluded,
    ),
    "checkpoint.enable_first_step_checkpoint": Dropped(
        "the first step is not saved for itself; a trial run with interval = 1 shows that saving works", equals(False)
    ),
    "checkpoint.enable_ft_dataloader_checkpoints": Dropped("every checkpoint has the data position", always),
    "checkpoint.create_seed_checkpoint": Dropped(
        "initial weights are the same on every mesh without one", equals(False)
    ),
    "checkpoint.load_only": Dropped(
        "to load and save nothing name the checkpoint in checkpoint.initial_load_path, with checkpoint.enable = false",
        equals(False),
    ),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": Changed(
        "a mixture's routers are always computed again", when=_names_routers, to=_routers_left_out
    ),
    "activation_checkpoint.early_stop": Dropped("recomputation always stops when it has what is needed", always),
    "activation_checkpoint.visualize_memory_budget_pareto": Dropped("no such picture is drawn", equals(False)),
    "activation_checkpoint.preserve_rng_state": Dropped("a block draws no random numbers", always),
    "activation_checkpoint.determinism_check": Dropped("torch's default check is made", equals("default")),
    "activation_checkpoint.debug": Dropped("recomputation is not traced", equals(False)),
    _NOT_IN_FLOAT8: Changed(
        'a list here; "auto_filter_small_kn" is "auto_filter_small", "moe.shared_experts" "feed_forward.shared"; '
        'routers and "moe" are left out: of a mixture only the shared expert is a linear layer here',
        when=_names_modules_otherwise(_NOT_IN_FLOAT8, _is_linear_here),
        to=_modules(_NOT_IN_FLOAT8, _is_linear_here),
    ),
    **{
        f"quantize.linear.mx.{key}": Dropped(_NO_MX, _is_left_alone("quantize.linear.mx"))
        for key in ("mxfp8_dim1_cast_kernel_choice", "recipe_name", "filter_fqns")
    },
    _EXPERTS_IN_FLOAT8: Changed(
        'a list here, and "moe" is "feed_forward"',
        when=_names_modules_otherwise(_EXPERTS_IN_FLOAT8, bool),
        to=_modules(_EXPERTS_IN_FLOAT8, bool),
    ),
    **{
        f"quantize.grouped_mm.mx.{key}": Dropped(_NO_GROUPED_MX, _is_left_alone("quantize.grouped_mm.mx"))
        for key in ("recipe_name", "fqns")
    },
    "comm.save_traces_file_prefix": Dropped("files in comm.save_traces_folder are named by rank", always),
    "comm.mode": Dropped(
        "`torchtitan-lite config show --world-size N` tries a recipe for N ranks without starting one",
        equals("default"),
    ),
    "memory_estimation.enable": Dropped(
        "`torchtitan-lite config show --world-size N` tells what blocks keep", equals(False)
    ),
    "memory_estimation.disable_fake_mode": Dropped("a key of memory_estimation.enable", always),
    "fault_tolerance.enable": Dropped(
        "there is no TorchFT: torchrun restarts what fails from the last checkpoint, on the nodes that are left "
        "(docs/elastic.md)",
        equals(False),
    ),
    **{
        f"fault_tolerance.{key}": Dropped(_TORCHFT, always)
        for key in ("process_group", "process_group_timeout_ms", "replica_id", "group_size", "min_replica_size")
    },
    "fault_tolerance.semi_sync_method": Dropped("every step is synchronous: no local SGD, no DiLoCo"),
    "experimental.custom_import": Dropped(
        'a model from outside is named in model.spec = "package.module:SPEC"', equals("")
    ),
    "experimental.custom_args_module": Dropped(_OWN_KEYS, equals("")),
    "validation.dataset": Dropped(_HELD_OUT),
    "validation.dataset_path": Dropped(_HELD_OUT),
    "validation.seq_len": Dropped(
        "samples of validation are as long as those of training",
        lambda value, old: value == old.get("training.seq_len", 2048),
    ),
    "validation.freq": Changed(
        "here validated after every so many steps and after the last; there after the first too"
    ),
    "validation.steps": Changed(
        "here batches of training.global_batch_size samples; there of validation.local_batch_size on each "
        "data-parallel rank",
        when=lambda value, old: value != -1,
    ),
    **{
        f"validation.dataloader.{key}": Dropped(_MAPPED, always)
        for key in ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")
    },
    "debug.deterministic_warn_only": Dropped("an operation without a deterministic kernel raises", equals(False)),
    # 0.2.0's
    "training.seed": Renamed("debug.seed"),
    "training.deterministic": Renamed("debug.deterministic"),
    "training.debug_moe_force_load_balance": Renamed("debug.moe_force_load_balance"),
    "parallelism.enable_compiled_autograd": Dropped("the backward is compiled with its block", equals(False)),
}

TITAN: dict[str, Entry] = {
    **{f"{section}.{key}": Kept() for section, keys in _KEPT.items() for key in keys.split()},
    **_OTHERS,
}

# Arguments of TorchTitan's models that are keys here, in whatever section a recipe has them.
OF_MODELS = {"load_balance_coeff": "moe.bias_update_rate"}


def _saves(old: Old) -> bool:
    return bool(old.get("checkpoint.enable"))


# Defaults that differ: (default there, what follows here), told where the old recipe leaves the key out and `when`.
DEFAULTS: dict[str, tuple[str, str, Callable[[Old], bool]]] = {
    "job.dump_folder": ('"./outputs"', "outputs/ and the recipe's name, for the run alone", lambda old: True),
    "metrics.enable_tensorboard": ("false", "true", lambda old: True),
    "training.dataset": ('"c4_test"', "the source files of Python's standard library", lambda old: True),
    "debug.seed": ("another at each start", "42", lambda old: "training.seed" not in old),
    "checkpoint.last_save_model_only": ("true", "false: the last checkpoint can be continued from", _saves),
}

# What keeps a run the same where a default or a meaning differs: (value, why, when).
ADDED: dict[str, tuple[Any, str, Callable[[Old], bool]]] = {
    "optimizer.weight_decay_exclude": (
        [],
        "as in TorchTitan all parameters decay; by default norms and biases do not",
        lambda old: old.get("optimizer.weight_decay", 0.1) != 0,
    ),
}
