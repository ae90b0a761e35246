"""What TensorBoard says of a run beside its numbers: the settings that recipes are compared by, and its config."""

from operator import attrgetter

from torchtitan_lite.config.document import config_lines
from torchtitan_lite.config.resolution import uses_float8
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.observability.tensorboard import About, Setting, TensorBoard
from torchtitan_lite.preflight import JobPlan

# Keys as they stand in a resolved recipe, and what the columns are called.
_KEYS = {
    "parallelism.data_parallel_replicate_degree": "dp_replicate",
    "parallelism.data_parallel_shard_degree": "dp_shard",
    "parallelism.tensor_parallel_degree": "tp",
    "parallelism.pipeline_parallel_degree": "pp",
    "parallelism.context_parallel_degree": "cp",
    "parallelism.expert_parallel_degree": "ep",
    "training.global_batch_size": "global batch",
    "training.local_batch_size": "local batch",
    "training.seq_len": "seq_len",
    "training.steps": "steps",
    "training.mixed_precision_param": "dtype",
    "optimizer.name": "optimizer",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "lr_scheduler.warmup_steps": "warmup_steps",
    "compile.enable": "compile",
    "debug.seed": "seed",
}
_FIRST = ("model", "mesh", "training.global_batch_size", "training.seq_len", "optimizer.lr")


def open_board(plan: JobPlan, here: Runtime, first_step: int) -> TensorBoard | None:
    """The run's TensorBoard, from `first_step` on; None on ranks that do not write it, and where it is off."""
    section = plan.config.metrics
    if here.rank != 0 or not section.enable_tensorboard:
        return None
    about = About(settings(plan), text(plan), here.device.type)
    return TensorBoard(plan.folder / section.save_tb_folder, first_step, about)


def settings(plan: JobPlan) -> tuple[Setting, ...]:
    """The same columns for every recipe: TensorBoard takes them from one of the runs."""
    config, checkpointing = plan.config, plan.config.activation_checkpoint
    mode: str = checkpointing.mode
    if mode == "selective":
        mode += f" {checkpointing.selective_ac_option}"
    float8 = config.quantize.linear.float8.recipe_name if uses_float8(config) else "none"
    columns = (
        ("model", "model", f"{plan.spec.name} {config.model.flavor}"),
        ("mesh", "mesh", str(plan.dims).partition(": ")[2] or str(plan.dims)),
        ("world_size", "ranks", plan.dims.world_size),
        *((key, heading, attrgetter(key)(config)) for key, heading in _KEYS.items()),
        ("activation_checkpoint.mode", "checkpointing", mode),
        ("quantize.linear.float8.recipe_name", "float8", float8),
    )
    return tuple(Setting(*column, first=column[0] in _FIRST) for column in columns)


def text(plan: JobPlan) -> str:
    """Markdown: the recipe and what it extends, what followed from it, the resolved config as TOML."""
    chain = ", extends ".join(f"`{name}`" for name in plan.origin.chain)
    derived = "\n".join(f"- {what}: {value}" for what, value in plan.derived())
    config = "\n".join(config_lines(plan.config))
    return f"Recipe {chain}\n\n{derived}\n\n```toml\n{config}\n```\n"
