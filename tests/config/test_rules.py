"""Every rule across keys refuses what it names and lets the next best value pass."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from torchtitan_lite.config import rules
from torchtitan_lite.config.optimizing import ParamGroup
from torchtitan_lite.config.schema import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Data,
    Debug,
    Faults,
    JobConfig,
    LRScheduler,
    Metrics,
    Model,
    Optimizer,
    Parallelism,
    Profiling,
    Training,
    Validation,
)
from torchtitan_lite.config.techniques import Float8, GroupedFloat8, GroupedProducts, LinearLayers, Quantize
from torchtitan_lite.errors import UserError

Rule = Callable[[JobConfig], None]

_ASYNC = Parallelism(enable_async_tensor_parallel=True, tensor_parallel_degree=2)
_MIXTURE = Training(dataset="mixture")
_EXPERTS = Model(converters=["quantize.grouped_mm.float8"])


def _float8(**keys: Any) -> Quantize:
    return Quantize(LinearLayers(Float8(**keys)))


def _grouped_float8(**keys: Any) -> Quantize:
    return Quantize(grouped_mm=GroupedProducts(GroupedFloat8(**keys)))


REFUSED: list[tuple[Rule, JobConfig, str]] = [
    (
        rules.states_in_bfloat16_forget_in_time,
        JobConfig(optimizer=Optimizer(beta2=0.999, state_dtype="bfloat16")),
        'optimizer.beta2 = 0.999: optimizer.state_dtype = "bfloat16" rounds away what changes so slowly; lower it to',
    ),
    (
        rules.states_in_bfloat16_forget_in_time,
        JobConfig(optimizer=Optimizer(param_groups=[ParamGroup("*", beta2=0.995)], state_dtype="bfloat16")),
        "optimizer.param_groups[0].beta2 = 0.995: ",
    ),
    (
        rules.parameter_groups_have_patterns,
        JobConfig(optimizer=Optimizer(param_groups=[ParamGroup("*"), ParamGroup(lr_factor=0.5)])),
        "optimizer.param_groups[1] names no parameters: give it a pattern",
    ),
    (
        rules.async_tensor_parallel_needs_compile,
        JobConfig(parallelism=_ASYNC),
        "parallelism.enable_async_tensor_parallel = true is done by the compiler: set compile.enable = true",
    ),
    (
        rules.async_tensor_parallel_needs_compile,
        JobConfig(parallelism=_ASYNC, compile=Compile(enable=True, backend="aot_eager")),
        "parallelism.enable_async_tensor_parallel = true is done by the compiler: set compile.enable = true and "
        'compile.backend = "inductor"',
    ),
    (
        rules.async_tensor_parallel_needs_compile,
        JobConfig(parallelism=Parallelism(enable_async_tensor_parallel=True), compile=Compile(enable=True)),
        "parallelism.enable_async_tensor_parallel = true has nothing to overlap while "
        "parallelism.tensor_parallel_degree = 1",
    ),
    (
        rules.one_way_to_cut_a_pipeline,
        JobConfig(
            parallelism=Parallelism(pipeline_parallel_layers_per_stage=2, module_fqns_per_model_part=[["layers.0"]])
        ),
        "parallelism.pipeline_parallel_layers_per_stage = 2 and module_fqns_per_model_part both cut the model",
    ),
    (
        rules.csv_schedule_names_a_file,
        JobConfig(parallelism=Parallelism(pipeline_parallel_schedule="PipelineScheduleMulti")),
        'parallelism.pipeline_parallel_schedule = "PipelineScheduleMulti" takes its order from a file: name it',
    ),
    (
        rules.csv_schedule_names_a_file,
        JobConfig(parallelism=Parallelism(pipeline_parallel_schedule_csv="order.csv")),
        'parallelism.pipeline_parallel_schedule_csv = order.csv and pipeline_parallel_schedule = "1F1B" both order',
    ),
    (
        rules.experts_are_not_split,
        JobConfig(parallelism=Parallelism(expert_tensor_parallel_degree=2)),
        "parallelism.expert_tensor_parallel_degree = 2: tensor parallelism does not split experts",
    ),
    (
        rules.excluding_needs_something_to_load,
        JobConfig(checkpoint=Checkpoint(initial_load_path="before", exclude_from_loading=["optimizer"])),
        "checkpoint.exclude_from_loading = ['optimizer'] leaves out parts",
    ),
    (
        rules.spikes_are_skipped_with_what_is_no_number,
        JobConfig(faults=Faults(skip_nonfinite=False, loss_spike_sigmas=6.0)),
        "faults.loss_spike_sigmas = 6.0 skips spikes, and faults.skip_nonfinite = false would let pass",
    ),
    (
        rules.rolling_back_needs_checkpoints,
        JobConfig(faults=Faults(then="roll_back")),
        'faults.then = "roll_back" goes back to a checkpoint: set checkpoint.enable = true',
    ),
    (
        rules.replay_needs_determinism,
        JobConfig(debug=Debug(replay_steps=[3])),
        "debug.replay_steps = [3] compares bits, which only debug.deterministic = true repeats",
    ),
    (
        rules.traced_steps_fit_their_period,
        JobConfig(profiling=Profiling(True, profile_freq=10, profiler_warmup=8, profiler_active=3)),
        "profiling.profiler_warmup = 8 and profiler_active = 3 take 11 steps, and profiling.profile_freq = 10 has them",
    ),
    (
        rules.anomalies_are_named_in_eager_code,
        JobConfig(debug=Debug(detect_anomaly=True), compile=Compile(enable=True)),
        "debug.detect_anomaly = true cannot name an operation within compiled code; set compile.enable = false",
    ),
    (
        rules.one_step_to_start_from,
        JobConfig(checkpoint=Checkpoint(initial_load_path="before", load_step=5)),
        "checkpoint.load_step = 5 goes back to a step of this run",
    ),
    (
        rules.text_dataset_needs_a_path,
        JobConfig(training=Training(dataset="text")),
        'training.dataset = "text" needs training.dataset_path',
    ),
    (
        rules.only_a_text_dataset_takes_a_path,
        JobConfig(training=Training(dataset="python_stdlib", dataset_path="books")),
        'training.dataset_path = "books" has no effect with training.dataset = "python_stdlib"; set training.dataset',
    ),
    (
        rules.only_a_text_dataset_takes_a_path,
        JobConfig(training=Training(dataset="mixture", dataset_path="books")),
        'training.dataset_path = "books" has no effect with training.dataset = "mixture"; name it in data.',
    ),
    *(
        (
            rules.a_mixture_weighs_several_paths,
            JobConfig(training=_MIXTURE, data=Data(mixture_paths=paths, mixture_weights=weights)),
            message,
        )
        for paths, weights, message in (
            ([], [], 'training.dataset = "mixture" needs two data.mixture_paths or more, and [] has 0; one source is'),
            (["a"], [1], "training.dataset = \"mixture\" needs two data.mixture_paths or more, and ['a'] has 1"),
            (["a", "b"], [], "data.mixture_weights = []: 0 for 2 data.mixture_paths; give each path one"),
            (["a", "b"], [1, 2, 3], "data.mixture_weights = [1, 2, 3]: 3 for 2 data.mixture_paths"),
            (["a", "b"], [1, 0], "data.mixture_weights = [1, 0]: each must be at least 1; leave out the path that has"),
            (["a", "b"], [-3, 2], "data.mixture_weights = [-3, 2]: each must be at least 1"),
            (["a", "b"], [10_000, 1], "data.mixture_weights = [10000, 1]: their sum, 10001, must be at most 10000"),
        )
    ),
    (
        rules.only_a_mixture_takes_mixture_keys,
        JobConfig(data=Data(mixture_paths=["a", "b"], mixture_weights=[1, 1])),
        "data.mixture_paths = ['a', 'b'] has no effect with training.dataset = \"python_stdlib\"; set it to",
    ),
    (
        rules.only_a_mixture_takes_mixture_keys,
        JobConfig(training=Training(dataset="text", dataset_path="books"), data=Data(mixture_weights=[1])),
        'data.mixture_weights = [1] has no effect with training.dataset = "text"; set it to "mixture" or',
    ),
    (
        rules.outside_spec_takes_no_name,
        JobConfig(model=Model(spec="package.module:SPEC", name="mine")),
        'model.spec = "package.module:SPEC" and model.name = "mine" both choose a model; keep one',
    ),
    (
        rules.schedule_covers_the_run,
        JobConfig(training=Training(steps=11), lr_scheduler=LRScheduler(total_steps=10)),
        "lr_scheduler.total_steps = 10 ends before training.steps = 11; raise it or leave it at -1",
    ),
    (
        rules.validation_needs_a_held_out_part,
        JobConfig(validation=Validation(enable=True), data=Data(validation_fraction=0.0)),
        "validation.enable = true needs data.validation_fraction above 0",
    ),
    *(
        (
            rules.folders_stay_in_the_run_folder,
            JobConfig(checkpoint=Checkpoint(folder=folder)),
            f'checkpoint.folder = "{folder}": expected the name of a folder inside the run folder',
        )
        for folder in ("", " ", ".", "..", "/tmp/elsewhere", "../beside", "a/../../b")
    ),
    (
        rules.folders_stay_in_the_run_folder,
        JobConfig(metrics=Metrics(save_tb_folder="../tb")),
        'metrics.save_tb_folder = "../tb": expected the name of a folder inside the run folder',
    ),
    (
        rules.histograms_need_tensorboard,
        JobConfig(metrics=Metrics(enable_tensorboard=False, histogram_freq=10)),
        "metrics.histogram_freq = 10: histograms go to TensorBoard, and metrics.enable_tensorboard = false; set it to",
    ),
    *(
        (
            rules.checkpointing_option_is_op_or_a_number,
            JobConfig(activation_checkpoint=ActivationCheckpoint("selective", option)),
            f'activation_checkpoint.selective_ac_option = "{option}": expected "op" or a number n',
        )
        for option in ("0", "-1", "ops", "1.5", "")
    ),
    *(
        (
            rules.memory_budget_is_the_compilers,
            JobConfig(
                activation_checkpoint=ActivationCheckpoint("memory_budget"), compile=Compile(enable, backend=backend)
            ),
            'activation_checkpoint.mode = "memory_budget" is kept by the compiler: set compile.enable = true',
        )
        for enable, backend in ((False, "inductor"), (True, "eager"))
    ),
    (
        rules.compile_has_components,
        JobConfig(compile=Compile(enable=True, components=[])),
        "compile.components = []: nothing to compile",
    ),
    (
        rules.memory_budget_is_the_compilers,
        JobConfig(
            activation_checkpoint=ActivationCheckpoint("memory_budget"),
            compile=Compile(enable=True, components=["loss"]),
        ),
        'activation_checkpoint.mode = "memory_budget" is kept where blocks are compiled, and compile.components',
    ),
]

REFUSED += [
    (
        rules.float8_of_experts_names_some,
        JobConfig(model=_EXPERTS, quantize=_grouped_float8(emulate=True)),
        "quantize.grouped_mm.float8.fqns = []: names no experts",
    ),
    (
        rules.float8_of_experts_gives_bfloat16,
        JobConfig(
            model=_EXPERTS,
            training=Training(mixed_precision_param="float32"),
            quantize=_grouped_float8(fqns=["experts"]),
        ),
        'training.mixed_precision_param = "float32": products of experts in float8 give bfloat16',
    ),
    (
        rules.float8_gathers_are_tensorwise,
        JobConfig(quantize=_float8(recipe_name="rowwise", enable_fsdp_float8_all_gather=True)),
        'quantize.linear.float8.recipe_name = "rowwise" has no float8 gathers',
    ),
    (
        rules.float8_gathers_are_tensorwise,
        JobConfig(quantize=_float8(precompute_float8_dynamic_scale_for_fsdp=True)),
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = true computes scales for float8 gathers",
    ),
    (
        rules.float8_gathers_are_tensorwise,
        JobConfig(quantize=_float8(recipe_name="rowwise_with_gw_hp", filter_fqns=["auto_filter_small"])),
        "quantize.linear.float8.filter_fqns: torchao knows no sizes",
    ),
    (
        rules.converters_are_named_once,
        JobConfig(model=Model(converters=["quantize.linear.float8"] * 2)),
        "model.converters = ",
    ),
]

PASSED: list[tuple[Rule, JobConfig]] = [
    (
        rules.states_in_bfloat16_forget_in_time,
        JobConfig(optimizer=Optimizer(beta2=0.99, momentum=0.99, state_dtype="bfloat16")),
    ),
    (rules.states_in_bfloat16_forget_in_time, JobConfig(optimizer=Optimizer(beta2=0.999, state_dtype="int8"))),
    (rules.parameter_groups_have_patterns, JobConfig(optimizer=Optimizer(param_groups=[ParamGroup("*.bias")]))),
    *(
        (
            rules.checkpointing_option_is_op_or_a_number,
            JobConfig(activation_checkpoint=ActivationCheckpoint("selective", option)),
        )
        for option in ("op", "1", "12")
    ),
    (
        rules.memory_budget_is_the_compilers,
        JobConfig(activation_checkpoint=ActivationCheckpoint("memory_budget"), compile=Compile(enable=True)),
    ),
    (rules.compile_has_components, JobConfig(compile=Compile(enable=True, components=["loss"]))),
    (rules.float8_gathers_are_tensorwise, JobConfig(quantize=_float8(enable_fsdp_float8_all_gather=True))),
    (rules.float8_of_experts_names_some, JobConfig(model=_EXPERTS, quantize=_grouped_float8(fqns=["experts"]))),
    (rules.float8_of_experts_names_some, JobConfig(quantize=_grouped_float8(fqns=[]))),
    (
        rules.float8_of_experts_gives_bfloat16,
        JobConfig(model=_EXPERTS, quantize=_grouped_float8(fqns=["experts"], emulate=True)),
    ),
    (
        rules.float8_of_experts_gives_bfloat16,
        JobConfig(model=_EXPERTS, training=Training(mixed_precision_param="bfloat16"), quantize=_grouped_float8()),
    ),
    (rules.converters_are_named_once, JobConfig(model=Model(converters=["quantize.linear.float8"]))),
    (rules.async_tensor_parallel_needs_compile, JobConfig(parallelism=_ASYNC, compile=Compile(enable=True))),
    (
        rules.one_way_to_cut_a_pipeline,
        JobConfig(parallelism=Parallelism(module_fqns_per_model_part=[["layers.0"]])),
    ),
    (
        rules.csv_schedule_names_a_file,
        JobConfig(
            parallelism=Parallelism(
                pipeline_parallel_schedule="PipelineScheduleMulti", pipeline_parallel_schedule_csv="order.csv"
            )
        ),
    ),
    (rules.experts_are_not_split, JobConfig(parallelism=Parallelism(tensor_parallel_degree=2))),
    *((rule, JobConfig()) for rule in rules.RULES),
    (
        rules.excluding_needs_something_to_load,
        JobConfig(
            checkpoint=Checkpoint(
                initial_load_path="before", initial_load_model_only=False, exclude_from_loading=["optimizer"]
            )
        ),
    ),
    (rules.one_step_to_start_from, JobConfig(checkpoint=Checkpoint(load_step=5))),
    (
        rules.spikes_are_skipped_with_what_is_no_number,
        JobConfig(faults=Faults(loss_spike_sigmas=6.0, grad_norm_spike_sigmas=6.0)),
    ),
    (
        rules.rolling_back_needs_checkpoints,
        JobConfig(faults=Faults(then="roll_back"), checkpoint=Checkpoint(enable=True)),
    ),
    (rules.replay_needs_determinism, JobConfig(debug=Debug(replay_steps=[3], deterministic=True))),
    (
        rules.traced_steps_fit_their_period,
        JobConfig(profiling=Profiling(True, profile_freq=10, profiler_warmup=8, profiler_active=2)),
    ),
    (rules.traced_steps_fit_their_period, JobConfig(profiling=Profiling(profile_freq=1))),
    (
        rules.anomalies_are_named_in_eager_code,
        JobConfig(debug=Debug(detect_anomaly=True), compile=Compile(enable=True, backend="eager")),
    ),
    (rules.text_dataset_needs_a_path, JobConfig(training=Training(dataset="text", dataset_path="books"))),
    (rules.only_a_text_dataset_takes_a_path, JobConfig(training=Training(dataset="text", dataset_path="books"))),
    *(
        (rule, JobConfig(training=_MIXTURE, data=Data(mixture_paths=["a", "b"], mixture_weights=weights)))
        for rule in (rules.a_mixture_weighs_several_paths, rules.only_a_mixture_takes_mixture_keys)
        for weights in ([1, 1], [9_999, 1])
    ),
    (rules.outside_spec_takes_no_name, JobConfig(model=Model(spec="package.module:SPEC"))),
    (rules.outside_spec_takes_no_name, JobConfig(model=Model(name="mine"))),
    (
        rules.schedule_covers_the_run,
        JobConfig(training=Training(steps=10), lr_scheduler=LRScheduler(total_steps=10)),
    ),
    (
        rules.validation_needs_a_held_out_part,
        JobConfig(validation=Validation(enable=True), data=Data(validation_fraction=0.01)),
    ),
    (rules.validation_needs_a_held_out_part, JobConfig(data=Data(validation_fraction=0.0))),
    *(
        (rules.folders_stay_in_the_run_folder, JobConfig(checkpoint=Checkpoint(folder=folder)))
        for folder in ("checkpoint", "deep/er", ".hidden", "a..b", "...")
    ),
    (rules.histograms_need_tensorboard, JobConfig(metrics=Metrics(histogram_freq=10))),
    (rules.histograms_need_tensorboard, JobConfig(metrics=Metrics(enable_tensorboard=False))),
]


@pytest.mark.parametrize(("rule", "config", "message"), REFUSED)
def test_a_rule_refuses_and_names_the_mend(rule: Rule, config: JobConfig, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        rule(config)


@pytest.mark.parametrize(("rule", "config"), PASSED)
def test_a_rule_lets_pass_what_it_should(rule: Rule, config: JobConfig) -> None:
    rule(config)


def test_every_rule_is_in_the_table_and_tried_both_ways() -> None:
    written = [
        value
        for name, value in vars(rules).items()
        if callable(value) and getattr(value, "__module__", "") == rules.__name__ and not name.startswith("_")
    ]
    assert set(written) == set(rules.RULES)
    assert {rule for rule, *_ in REFUSED} == set(rules.RULES)
    assert {rule for rule, config in PASSED if config != JobConfig()} == set(rules.RULES)
