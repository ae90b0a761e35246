"""Rules across keys, one function each: the name says the rule, the message gives values and the mend.

They need the recipe alone. What also needs the world size or the model is checked in preflight.
"""

from collections.abc import Callable
from pathlib import PurePath

from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.errors import UserError

LARGEST_WINDOW = 10_000  # samples of a mixture; each window is dealt out as a whole, here in a tenth of a second
LONGEST_IN_BFLOAT16 = 0.99  # decay of a mean; see docs/optimizers.md


def text_dataset_needs_a_path(config: JobConfig) -> None:
    if config.training.dataset == "text" and not config.training.dataset_path:
        raise UserError('training.dataset = "text" needs training.dataset_path: a file or a folder of UTF-8 files')


def only_a_text_dataset_takes_a_path(config: JobConfig) -> None:
    training = config.training
    if training.dataset != "text" and training.dataset_path:
        instead = "name it in data.mixture_paths" if training.dataset == "mixture" else 'set training.dataset = "text"'
        raise UserError(
            f'training.dataset_path = "{training.dataset_path}" has no effect with training.dataset = '
            f'"{training.dataset}"; {instead} or remove the path'
        )


def a_mixture_weighs_several_paths(config: JobConfig) -> None:
    paths, weights = config.data.mixture_paths, config.data.mixture_weights
    if config.training.dataset != "mixture":
        return
    if len(paths) < 2:
        raise UserError(
            f'training.dataset = "mixture" needs two data.mixture_paths or more, and {paths} has {len(paths)}; one '
            'source is training.dataset = "text"'
        )
    if len(weights) != len(paths):
        raise UserError(
            f"data.mixture_weights = {weights}: {len(weights)} for {len(paths)} data.mixture_paths; give each path one"
        )
    if min(weights) < 1:
        raise UserError(
            f"data.mixture_weights = {weights}: each must be at least 1; leave out the path that has {min(weights)}"
        )
    if sum(weights) > LARGEST_WINDOW:
        raise UserError(
            f"data.mixture_weights = {weights}: their sum, {sum(weights)}, must be at most {LARGEST_WINDOW}; give "
            "smaller ones in the same proportions"
        )


def only_a_mixture_takes_mixture_keys(config: JobConfig) -> None:
    if config.training.dataset == "mixture":
        return
    for key in ("mixture_paths", "mixture_weights"):
        if value := getattr(config.data, key):
            raise UserError(
                f'data.{key} = {value} has no effect with training.dataset = "{config.training.dataset}"; set it to '
                '"mixture" or remove the key'
            )


def outside_spec_takes_no_name(config: JobConfig) -> None:
    if config.model.spec and config.model.name != type(config.model)().name:
        raise UserError(
            f'model.spec = "{config.model.spec}" and model.name = "{config.model.name}" both choose a model; keep one'
        )


def schedule_covers_the_run(config: JobConfig) -> None:
    total, steps = config.lr_scheduler.total_steps, config.training.steps
    if total != -1 and total < steps:
        raise UserError(
            f"lr_scheduler.total_steps = {total} ends before training.steps = {steps}; raise it or leave it at -1"
        )


def validation_needs_a_held_out_part(config: JobConfig) -> None:
    if config.validation.enable and config.data.validation_fraction == 0.0:
        raise UserError("validation.enable = true needs data.validation_fraction above 0, as in 0.02")


def folders_stay_in_the_run_folder(config: JobConfig) -> None:
    for name, folder in (
        ("checkpoint.folder", config.checkpoint.folder),
        ("metrics.save_tb_folder", config.metrics.save_tb_folder),
        ("comm.save_traces_folder", config.comm.save_traces_folder),
        ("profiling.save_traces_folder", config.profiling.save_traces_folder),
        ("profiling.save_memory_snapshot_folder", config.profiling.save_memory_snapshot_folder),
    ):
        path = PurePath(folder)
        if not folder.strip() or not path.parts or path.is_absolute() or ".." in path.parts:
            raise UserError(f'{name} = "{folder}": expected the name of a folder inside the run folder')


def histograms_need_tensorboard(config: JobConfig) -> None:
    if config.metrics.histogram_freq and not config.metrics.enable_tensorboard:
        raise UserError(
            f"metrics.histogram_freq = {config.metrics.histogram_freq}: histograms go to TensorBoard, and "
            "metrics.enable_tensorboard = false; set it to true, or histogram_freq to 0"
        )


def async_tensor_parallel_needs_compile(config: JobConfig) -> None:
    parallelism = config.parallelism
    if not parallelism.enable_async_tensor_parallel:
        return
    if parallelism.tensor_parallel_degree == 1:
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true has nothing to overlap while "
            "parallelism.tensor_parallel_degree = 1; set one of them"
        )
    if not config.compile.enable or config.compile.backend != "inductor":
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true is done by the compiler: set compile.enable = true and "
            'compile.backend = "inductor", or turn it off'
        )
    if "model" not in config.compile.components:
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true is done in compiled blocks, and compile.components names "
            'no "model"; add it, or turn it off'
        )


def one_way_to_cut_a_pipeline(config: JobConfig) -> None:
    parallelism = config.parallelism
    if parallelism.module_fqns_per_model_part and parallelism.pipeline_parallel_layers_per_stage != -1:
        raise UserError(
            f"parallelism.pipeline_parallel_layers_per_stage = {parallelism.pipeline_parallel_layers_per_stage} and "
            "module_fqns_per_model_part both cut the model into stages; keep one"
        )


def csv_schedule_names_a_file(config: JobConfig) -> None:
    parallelism = config.parallelism
    from_file = parallelism.pipeline_parallel_schedule in ("PipelineScheduleSingle", "PipelineScheduleMulti")
    if from_file and not parallelism.pipeline_parallel_schedule_csv:
        raise UserError(
            f'parallelism.pipeline_parallel_schedule = "{parallelism.pipeline_parallel_schedule}" takes its order from '
            "a file: name it in parallelism.pipeline_parallel_schedule_csv"
        )
    if parallelism.pipeline_parallel_schedule_csv and not from_file:
        raise UserError(
            f"parallelism.pipeline_parallel_schedule_csv = {parallelism.pipeline_parallel_schedule_csv} and "
            f'pipeline_parallel_schedule = "{parallelism.pipeline_parallel_schedule}" both order the pipeline; set the '
            'schedule to "PipelineScheduleMulti" or remove the file'
        )


def experts_are_not_split(config: JobConfig) -> None:
    if (degree := config.parallelism.expert_tensor_parallel_degree) > 1:
        raise UserError(
            f"parallelism.expert_tensor_parallel_degree = {degree}: tensor parallelism does not split experts, whose "
            "matrices are small; its ranks take whole ones, and share them under FSDP; set it to 1"
        )


def excluding_needs_something_to_load(config: JobConfig) -> None:
    section = config.checkpoint
    if section.exclude_from_loading and (not section.initial_load_path or section.initial_load_model_only):
        raise UserError(
            f"checkpoint.exclude_from_loading = {section.exclude_from_loading} leaves out parts of "
            "checkpoint.initial_load_path that initial_load_model_only = false alone loads; set both or remove it"
        )


def one_step_to_start_from(config: JobConfig) -> None:
    section = config.checkpoint
    if section.initial_load_path and section.load_step != -1:
        raise UserError(
            f"checkpoint.load_step = {section.load_step} goes back to a step of this run, and "
            "checkpoint.initial_load_path starts a new one; keep one"
        )


def spikes_are_skipped_with_what_is_no_number(config: JobConfig) -> None:
    section = config.faults
    for key in ("loss_spike_sigmas", "grad_norm_spike_sigmas"):
        if getattr(section, key) and not section.skip_nonfinite:
            raise UserError(
                f"faults.{key} = {getattr(section, key)} skips spikes, and faults.skip_nonfinite = false would let "
                "pass what is beyond any limit; set it to true or the limit to 0"
            )


def rolling_back_needs_checkpoints(config: JobConfig) -> None:
    if config.faults.then == "roll_back" and not config.checkpoint.enable:
        raise UserError('faults.then = "roll_back" goes back to a checkpoint: set checkpoint.enable = true, or "stop"')


def replay_needs_determinism(config: JobConfig) -> None:
    debug, steps = config.debug, config.training.steps
    if debug.replay_steps and not debug.deterministic:
        raise UserError(
            f"debug.replay_steps = {debug.replay_steps} compares bits, which only debug.deterministic = true repeats; "
            "set it, or replay no step"
        )
    if wrong := [step for step in debug.replay_steps if not 1 <= step <= steps]:
        raise UserError(f"debug.replay_steps names step {wrong[0]}, and training.steps = {steps}; valid: 1 to {steps}")


def traced_steps_fit_their_period(config: JobConfig) -> None:
    section = config.profiling
    warmup, active, period = section.profiler_warmup, section.profiler_active, section.profile_freq
    if section.enable_profiling and warmup + active > period:
        raise UserError(
            f"profiling.profiler_warmup = {warmup} and profiler_active = {active} take {warmup + active} steps, and "
            f"profiling.profile_freq = {period} has them every {period}; raise it to {warmup + active} or lower them"
        )


def anomalies_are_named_in_eager_code(config: JobConfig) -> None:
    """The backward of compiled code is one operation: a NaN in it would be named as that, and nothing more."""
    if config.debug.detect_anomaly and config.compile.enable and config.compile.backend != "eager":
        raise UserError(
            "debug.detect_anomaly = true cannot name an operation within compiled code; set compile.enable = false, or "
            'compile.backend = "eager"'
        )


def checkpointing_option_is_op_or_a_number(config: JobConfig) -> None:
    section = config.activation_checkpoint
    option = section.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) > 0):
        raise UserError(
            f'activation_checkpoint.selective_ac_option = "{option}": expected "op" or a number n, as in "2", for '
            "every n-th block"
        )


def compile_has_components(config: JobConfig) -> None:
    if config.compile.enable and not config.compile.components:
        raise UserError('compile.components = []: nothing to compile; name "model", "loss" or both')


def memory_budget_is_the_compilers(config: JobConfig) -> None:
    compiler = config.compile
    if config.activation_checkpoint.mode == "memory_budget" and (not compiler.enable or compiler.backend == "eager"):
        raise UserError(
            'activation_checkpoint.mode = "memory_budget" is kept by the compiler: set compile.enable = true and '
            'compile.backend = "inductor", or choose "selective" or "full"'
        )
    if config.activation_checkpoint.mode == "memory_budget" and "model" not in compiler.components:
        raise UserError(
            'activation_checkpoint.mode = "memory_budget" is kept where blocks are compiled, and compile.components '
            'names no "model"; add it, or choose "selective" or "full"'
        )


def float8_gathers_are_tensorwise(config: JobConfig) -> None:
    section = config.quantize.linear.float8
    if section.enable_fsdp_float8_all_gather and section.recipe_name != "tensorwise":
        raise UserError(
            f'quantize.linear.float8.recipe_name = "{section.recipe_name}" has no float8 gathers: set '
            'enable_fsdp_float8_all_gather = false, or recipe_name = "tensorwise"'
        )
    if section.precompute_float8_dynamic_scale_for_fsdp and not section.enable_fsdp_float8_all_gather:
        raise UserError(
            "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = true computes scales for float8 "
            "gathers: set enable_fsdp_float8_all_gather = true too"
        )
    if section.recipe_name == "rowwise_with_gw_hp" and "auto_filter_small" in section.filter_fqns:
        raise UserError(
            'quantize.linear.float8.filter_fqns: torchao knows no sizes for "auto_filter_small" with '
            'recipe_name = "rowwise_with_gw_hp"; name the layers'
        )


def float8_of_experts_names_some(config: JobConfig) -> None:
    if "quantize.grouped_mm.float8" in config.model.converters and not config.quantize.grouped_mm.float8.fqns:
        raise UserError(
            "quantize.grouped_mm.float8.fqns = []: names no experts whose products are to be in float8; set it to "
            '["experts"] for all of them'
        )


def float8_of_experts_gives_bfloat16(config: JobConfig) -> None:
    precision, emulated = config.training.mixed_precision_param, config.quantize.grouped_mm.float8.emulate
    if "quantize.grouped_mm.float8" in config.model.converters and not emulated and precision != "bfloat16":
        raise UserError(
            f'training.mixed_precision_param = "{precision}": products of experts in float8 give bfloat16; set it to '
            '"bfloat16", or quantize.grouped_mm.float8.emulate = true'
        )


def converters_are_named_once(config: JobConfig) -> None:
    converters = config.model.converters
    if len(set(converters)) < len(converters):
        raise UserError(f"model.converters = {converters}: each once")


def parameter_groups_have_patterns(config: JobConfig) -> None:
    for index, group in enumerate(config.optimizer.param_groups):
        if not group.pattern:
            raise UserError(
                f"optimizer.param_groups[{index}] names no parameters: give it a pattern, as in "
                'pattern = "tok_embeddings.*"'
            )


def states_in_bfloat16_forget_in_time(config: JobConfig) -> None:
    """A number in bfloat16 that is to change by less than half of its last bit does not change at all."""
    section = config.optimizer
    keys = {"beta2": section.beta2, "beta1": section.beta1, "momentum": section.momentum}
    for index, group in enumerate(section.param_groups):
        keys |= {f"param_groups[{index}].beta2": group.beta2, f"param_groups[{index}].beta1": group.beta1}
    for key, value in keys.items():
        if section.state_dtype == "bfloat16" and value > LONGEST_IN_BFLOAT16:
            raise UserError(
                f'optimizer.{key} = {value}: optimizer.state_dtype = "bfloat16" rounds away what changes so slowly; '
                f'lower it to {LONGEST_IN_BFLOAT16} at most, or take "float32" or "int8"'
            )


RULES: tuple[Callable[[JobConfig], None], ...] = (
    text_dataset_needs_a_path,
    only_a_text_dataset_takes_a_path,
    a_mixture_weighs_several_paths,
    only_a_mixture_takes_mixture_keys,
    outside_spec_takes_no_name,
    schedule_covers_the_run,
    validation_needs_a_held_out_part,
    folders_stay_in_the_run_folder,
    histograms_need_tensorboard,
    async_tensor_parallel_needs_compile,
    one_way_to_cut_a_pipeline,
    csv_schedule_names_a_file,
    experts_are_not_split,
    excluding_needs_something_to_load,
    one_step_to_start_from,
    spikes_are_skipped_with_what_is_no_number,
    rolling_back_needs_checkpoints,
    replay_needs_determinism,
    traced_steps_fit_their_period,
    anomalies_are_named_in_eager_code,
    checkpointing_option_is_op_or_a_number,
    compile_has_components,
    memory_budget_is_the_compilers,
    float8_gathers_are_tensorwise,
    float8_of_experts_names_some,
    float8_of_experts_gives_bfloat16,
    converters_are_named_once,
    parameter_groups_have_patterns,
    states_in_bfloat16_forget_in_time,
)
