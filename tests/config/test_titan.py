"""The table of TorchTitan's keys is whole, and what it says of them can be said of our schema."""

from typing import get_args, get_type_hints

from torchtitan_lite.config.loading import refusal
from torchtitan_lite.config.migration import OURS, entry_of
from torchtitan_lite.config.schema import Model
from torchtitan_lite.config.titan import ADDED, DEFAULTS, OF_MODELS, TITAN, Changed, Dropped, Renamed

# Every key of torchtitan/config/job_config.py of 0.2.2.
KEYS_OF_0_2_2 = {
    "job": """
        config_file dump_folder description print_config save_config_file custom_config_module
    """,
    "profiling": """
        enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup enable_memory_snapshot
        save_memory_snapshot_folder
    """,
    "metrics": """
        log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks enable_wandb
    """,
    "model": """
        name flavor hf_assets_path tokenizer_path converters print_after_conversion
    """,
    "optimizer": """
        name lr beta1 beta2 eps weight_decay implementation early_step_in_backward
    """,
    "lr_scheduler": """
        warmup_steps total_steps decay_ratio decay_type min_lr_factor
    """,
    "training": """
        dataset dataset_path local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload dtype
        mixed_precision_param mixed_precision_reduce gc_freq gc_debug
    """,
    "training.dataloader": """
        num_workers persistent_workers pin_memory prefetch_factor
    """,
    "parallelism": """
        data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward tensor_parallel_degree
        disable_loss_parallel enable_async_tensor_parallel pipeline_parallel_degree module_fqns_per_model_part
        pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers
        pipeline_parallel_layers_per_stage pipeline_parallel_schedule pipeline_parallel_schedule_csv
        pipeline_parallel_microbatch_size pipeline_parallel_expert_parallel_overlap context_parallel_degree
        context_parallel_load_balancer context_parallel_rotate_method expert_parallel_degree
        expert_tensor_parallel_degree expert_parallel_comm_backend
    """,
    "checkpoint": """
        enable enable_ft_dataloader_checkpoints folder interval initial_load_path initial_load_model_only
        initial_load_in_hf initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode
        keep_latest_k load_step exclude_from_loading enable_first_step_checkpoint create_seed_checkpoint load_only
    """,
    "activation_checkpoint": """
        mode selective_ac_option per_op_sac_force_recompute_mm_shapes_by_fqns early_stop memory_budget
        visualize_memory_budget_pareto preserve_rng_state determinism_check debug
    """,
    "compile": """
        enable components backend
    """,
    "quantize.linear.float8": """
        enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp recipe_name filter_fqns emulate
    """,
    "quantize.linear.mx": """
        mxfp8_dim1_cast_kernel_choice recipe_name filter_fqns
    """,
    "quantize.grouped_mm.float8": """
        fqns
    """,
    "quantize.grouped_mm.mx": """
        recipe_name fqns
    """,
    "comm": """
        init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix mode
    """,
    "memory_estimation": """
        enable disable_fake_mode
    """,
    "fault_tolerance": """
        enable process_group process_group_timeout_ms replica_id group_size min_replica_size semi_sync_method
    """,
    "experimental": """
        custom_import custom_args_module
    """,
    "validation": """
        enable dataset dataset_path local_batch_size seq_len freq steps
    """,
    "validation.dataloader": """
        num_workers persistent_workers pin_memory prefetch_factor
    """,
    "debug": """
        seed deterministic deterministic_warn_only moe_force_load_balance
    """,
}
# Those that 0.2.0 had under other names, or no longer has.
KEYS_OF_0_2_0 = {
    "training": "seed deterministic debug_moe_force_load_balance",
    "parallelism": "enable_compiled_autograd",
}


def _names(table: dict[str, str]) -> set[str]:
    return {f"{section}.{key}" for section, keys in table.items() for key in keys.split()}


def test_every_key_of_torchtitan_is_in_the_table_and_no_other() -> None:
    assert set(TITAN) == _names(KEYS_OF_0_2_2) | _names(KEYS_OF_0_2_0)


def test_no_key_that_the_schema_has_is_said_to_be_left_out() -> None:
    assert not [key for key in set(TITAN) & OURS if isinstance(TITAN[key], Dropped)]


def test_every_converter_that_the_schema_has_is_kept() -> None:
    converters = TITAN["model.converters"]
    assert isinstance(converters, Changed)
    for each in get_args(get_args(get_type_hints(Model)["converters"])[0]):
        assert not converters.when([each], {}), each


def test_a_key_that_the_schema_lacks_is_left_out_or_renamed() -> None:
    for key in set(TITAN) - OURS:
        assert isinstance(entry_of(key), (Dropped, Renamed)), key


def test_what_takes_the_place_of_a_key_is_a_key_here() -> None:
    for key in [*OF_MODELS.values(), *ADDED, *(entry.to for entry in TITAN.values() if isinstance(entry, Renamed))]:
        assert key in OURS, key
    for key, (value, _, _) in ADDED.items():
        assert refusal(key, value) is None
    assert set(DEFAULTS) <= OURS


def test_refusal_says_why_the_schema_does_not_take_a_value() -> None:
    assert refusal("training.steps", 3) is None
    assert refusal("training.steps", "three") == "expected an integer, got a string"
    assert refusal("training.steps", 0) == "must be at least 1"
