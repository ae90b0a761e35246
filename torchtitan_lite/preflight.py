"""Everything that can be known, checked and prepared before a process group starts. No torch.

The launcher runs it once; each rank runs it again and finds the same, the corpus in the cache.
"""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchtitan_lite.checkpoint.storage import find_checkpoint, published_steps, step_folder, verified
from torchtitan_lite.config import JobConfig, load_config, run_folder
from torchtitan_lite.config.difference import config_difference
from torchtitan_lite.config.loading import Origin, load_traced
from torchtitan_lite.config.resolution import BatchPlan, plan_batch, resolve, uses_float8, uses_grouped_float8
from torchtitan_lite.data.passed_over import read_passed_over
from torchtitan_lite.data.prepare import Prepared, prepare, require_samples
from torchtitan_lite.distributed.environment import accelerators
from torchtitan_lite.distributed.parallel_dims import ParallelDims, fewest_ranks
from torchtitan_lite.distributed.pipeline_plan import PipelinePlan, plan_pipeline
from torchtitan_lite.distributed.plans import Keeps, ParallelPlan, Saving, keeps
from torchtitan_lite.errors import UserError
from torchtitan_lite.mesh_rules import RULES, Case, without_effect
from torchtitan_lite.models.registry import find_model
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.observability.phases import PHASES
from torchtitan_lite.observability.sinks import LINE_FILES
from torchtitan_lite.optim.schedule import Schedule, build_schedule
from torchtitan_lite.strict_json import flat


@dataclass(frozen=True)
class JobPlan:
    """A recipe resolved for a world size. config holds no -1 that stands for something else any more.

    parallel: where techniques attach to the model. pipeline: its stages; None without a pipeline. origin: the files it
    comes from. filled: keys that the recipe leaves open, and the world size or another key fills.
    """

    recipe: Path
    config: JobConfig
    dims: ParallelDims
    batch: BatchPlan
    schedule: Schedule
    spec: ModelSpec
    model_args: Any
    parallel: ParallelPlan
    pipeline: PipelinePlan | None
    folder: Path
    origin: Origin
    filled: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.config.training.seq_len

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / self.config.checkpoint.folder

    def derived(self) -> list[tuple[str, str]]:
        """What followed from recipe and world size, for the log: (what, value)."""
        training = self.config.training
        parameters = f"{self.model_args.parameter_count():,} parameters"
        if self.parallel.experts is not None:
            parameters += f", {self.model_args.active_parameter_count():,} of them active for a token"
        lines = [
            ("model", f"{self.spec.name} {self.config.model.flavor}, {parameters}"),
            ("mesh", str(self.dims)),
            (
                "batch",
                f"{self.batch.global_batch_size} samples of {training.seq_len} = {self.tokens_per_step:,} tokens a "
                f"step; a rank runs {self.batch.microbatches} x {self.batch.microbatch_size}",
            ),
            ("schedule", f"{training.steps} steps to a peak of {self.schedule.peak:g}: {self.schedule}"),
        ]
        if self.pipeline is not None:
            lines.append(("pipeline", str(self.pipeline)))
        if (kept := self._kept_by_blocks()) is not None:
            lines.append(("kept", kept))
        return lines

    def saving(self) -> Saving:
        """What decides how much of a micro-batch's forward a block without checkpointing keeps on a rank."""
        parallelism, section = self.config.parallelism, self.config.activation_checkpoint
        return Saving(
            "all",
            width=4 if self.config.training.mixed_precision_param == "float32" else 2,
            # What is in bfloat16 is meant for a GPU, wherever its plan is made.
            fused_norms=accelerators() > 0 or self.config.training.mixed_precision_param == "bfloat16",
            tp=self.dims.tp,
            cp=self.dims.cp,
            ep=self.dims.ep,
            exchanges_heads=parallelism.context_parallel_rotate_method == "alltoall",
            recomputed=tuple(section.per_op_sac_force_recompute_mm_shapes_by_fqns),
        )

    def _kept_by_blocks(self) -> str | None:
        """What they keep of a micro-batch's forward for its backward; None for a model that does not say."""
        if not hasattr(self.model_args, "saved_by_block"):
            return None
        config, saving = self.config, self.saving()
        tokens = self.batch.microbatch_size * config.training.seq_len / self.dims.cp
        blocks = sum("." in name for name in self.model_args.flops_by_module(config.training.seq_len))
        kinds = Counter(keeps(config.activation_checkpoint, index) for index in range(blocks))

        def told(kept: Keeps) -> str:
            return f"{tokens * self.model_args.saved_by_block(replace(saving, keeps=kept)) / 2**20:,.1f} MiB"

        each = ", ".join(f"{told(kind)} of a micro-batch in each of {count} blocks" for kind, count in kinds.items())
        whole = "" if "all" in kinds else f", {told('all')} without checkpointing"
        compiled = "; less where the compiler recomputes" if config.compile.enable else ""
        elsewhere = "; on a GPU, as bfloat16 is for" if saving.fused_norms and not accelerators() else ""
        return f"{each}{whole}{compiled}{elsewhere}"

    def warnings(self) -> list[str]:
        """What is legal and probably not meant."""
        found = without_effect(self.config, experts=self.parallel.experts is not None)
        if self.pipeline is not None and self.pipeline.microbatches - self.pipeline.padding < len(self.pipeline.stages):
            found.append(
                f"{self.pipeline.microbatches - self.pipeline.padding} micro-batches for {len(self.pipeline.stages)} "
                f"pipeline stages: {self.pipeline.bubble():.0%} of each rank's time is idle or empty at least; raise "
                "training.global_batch_size or lower parallelism.pipeline_parallel_microbatch_size"
            )
        profiling, steps = self.config.profiling, self.config.training.steps
        if profiling.enable_profiling and profiling.profile_freq > steps:
            found.append(
                f"profiling.enable_profiling = true traces nothing: profiling.profile_freq = {profiling.profile_freq} "
                f"is past training.steps = {steps}; lower it"
            )
        if self.config.debug.detect_anomaly:
            found.append(
                "debug.detect_anomaly = true looks at every gradient: steps are slower, and wait for the device"
            )
        return found


def plan_job(recipe: str | Path, overrides: Sequence[str], world_size: int) -> JobPlan:
    """Load a recipe and resolve it for `world_size` ranks. Touches no file but recipes. Raises UserError."""
    asked, origin = load_traced(recipe, overrides)
    config = asked
    dims = ParallelDims.from_config(config.parallelism, world_size)
    spec, args = find_model(config.model)
    folder = run_folder(config, recipe)
    config = resolve(config, dims.dp_shard, dims.batch_ranks, str(folder))
    parallel = spec.plan(args)
    batch = plan_batch(config.training.global_batch_size, config.training.local_batch_size, dims.batch_ranks)
    pipeline = None
    if dims.pp > 1 and parallel.stages:
        most = len(batch.share(0))
        pipeline = plan_pipeline(config.parallelism, args.flops_by_module(config.training.seq_len), most)
        batch = replace(batch, microbatches=pipeline.microbatches, microbatch_size=pipeline.microbatch_size)
    case = Case(config, dims, f"{spec.name} {config.model.flavor}", args.max_seq_len, parallel, pipeline)
    for rule in RULES:
        rule(case)
    schedule = build_schedule(config.lr_scheduler, config.optimizer.lr)
    differs = config_difference(asdict(asked), asdict(config))
    filled = tuple(
        f"{at}.{key}" for at, keys in differs.items() for key, (open_, _) in keys.items() if open_ in (-1, "")
    )
    return JobPlan(Path(recipe), config, dims, batch, schedule, spec, args, parallel, pipeline, folder, origin, filled)


def plan_smallest(recipe: str | Path, overrides: Sequence[str] = ()) -> JobPlan:
    """The plan for the fewest ranks that the degrees ask for. Raises UserError as plan_job.

    Where FSDP takes the ranks that are left, and is refused for having none to shard over, for twice as many.
    """
    parallelism = load_config(recipe, overrides).parallelism
    ranks = fewest_ranks(parallelism)
    try:
        return plan_job(recipe, overrides, ranks)
    except UserError:
        if parallelism.data_parallel_shard_degree != -1:
            raise
    return plan_job(recipe, overrides, 2 * ranks)


def prepare_job(plan: JobPlan) -> Prepared:
    """Make the run folder and the corpus ready, and see that they fit each other. Raises UserError."""
    config = plan.config
    _async_tensor_parallel_needs_accelerators(config)
    _float8_of_experts_needs_accelerators(config)
    _memory_snapshots_need_accelerators(config)
    _torchao_is_there(config)
    _compiler_is_there(config)
    _tensorboard_is_there(config)
    profiling = config.profiling
    folders = {
        config.checkpoint.folder: True,
        config.metrics.save_tb_folder: True,
        config.comm.save_traces_folder: True,
        profiling.save_traces_folder: profiling.enable_profiling,
        profiling.save_memory_snapshot_folder: profiling.enable_memory_snapshot,
        PHASES: profiling.phases,
    }
    _make_writable(plan.folder, [name for name, written in folders.items() if written])
    _resume_needs_checkpoints_on(plan)
    _named_checkpoints_exist(plan)
    read_passed_over(plan.folder)  # for what it raises, before ranks meet
    prepared = prepare(config.training, config.data, config.model.tokenizer_path, plan.model_args.vocab_size)
    require_samples(prepared, config.training.seq_len, config.validation.enable)
    _refuse_another_run(plan, prepared)
    return prepared


def identity(plan: JobPlan, prepared: Prepared) -> dict[str, Any]:
    """What may not change when a run is resumed."""
    return {
        "model": {"name": plan.spec.name, **asdict(plan.model_args)},
        "tokenizer": prepared.tokenizer_fingerprint,
        "data": prepared.fingerprint,
        "data.mixture_weights": plan.config.data.mixture_weights or None,
        "training.seq_len": plan.config.training.seq_len,
        "debug.seed": plan.config.debug.seed,
        "checkpoint.folder": plan.config.checkpoint.folder,
    }


def finished_step(plan: JobPlan, rank: int = 0, ranks: int = 1) -> int | None:
    """The step of a good checkpoint that already is at training.steps or past it; None where the run has more to do.

    Reads the rank's share of its files: a run whose last checkpoint is bad to any rank is not finished.
    """
    section = plan.config.checkpoint
    steps = published_steps(plan.checkpoint_folder) if section.enable and section.load_step == -1 else []
    if not steps or steps[-1] < plan.config.training.steps:
        return None
    return None if verified(step_folder(plan.checkpoint_folder, steps[-1]), rank=rank, ranks=ranks) else steps[-1]


@contextmanager
def run_folder_held(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep every other run out of the folder. The lock goes with the process, however it ends.

    patience_s: how long to wait for one that is about to end.
    """
    deadline = time.monotonic() + patience_s
    with (folder / ".lock").open("a+") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                handle.seek(0)
                raise UserError(
                    f"{folder}: process {handle.read()} is running in it; wait for it, stop it, or choose another "
                    "job.dump_folder"
                ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _async_tensor_parallel_needs_accelerators(config: JobConfig) -> None:
    if config.parallelism.enable_async_tensor_parallel and not accelerators():
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true needs CUDA's symmetric memory, and this machine has no "
            "accelerator; set it to false"
        )


def _float8_of_experts_needs_accelerators(config: JobConfig) -> None:
    if uses_grouped_float8(config) and not config.quantize.grouped_mm.float8.emulate and not accelerators():
        raise UserError(
            'model.converters = ["quantize.grouped_mm.float8"] needs CUDA, and this machine has no accelerator; set '
            "quantize.grouped_mm.float8.emulate = true, or take it out"
        )


def _memory_snapshots_need_accelerators(config: JobConfig) -> None:
    if config.profiling.enable_memory_snapshot and not accelerators():
        raise UserError(
            "profiling.enable_memory_snapshot = true keeps the history of CUDA's allocator, and this machine has no "
            "accelerator; set it to false"
        )


def _torchao_is_there(config: JobConfig) -> None:
    asked = {
        'model.converters = ["quantize.linear.float8"]': uses_float8(config),
        'model.converters = ["quantize.grouped_mm.float8"]': (
            uses_grouped_float8(config) and not config.quantize.grouped_mm.float8.emulate
        ),
        'optimizer.state_dtype = "int8"': config.optimizer.state_dtype == "int8",
    }
    for setting, needed in asked.items():
        if needed and find_spec("torchao") is None:
            raise UserError(f'{setting} needs torchao, which is not installed: pip install "torchtitan-lite[torchao]"')


def _compiler_is_there(config: JobConfig) -> None:
    """What inductor writes, another compiler translates."""
    if not config.compile.enable or config.compile.backend != "inductor":
        return
    mend = 'or set compile.backend = "aot_eager", or compile.enable = false'
    if accelerators() and find_spec("triton") is None:
        raise UserError(
            f'compile.backend = "inductor" needs triton, which is not installed: pip install triton, {mend}'
        )
    program = os.environ.get("CXX", "g++").split()[0]
    if not accelerators() and shutil.which(program) is None:
        raise UserError(
            f'compile.backend = "inductor" needs a C++ compiler, and there is no {program} (environment variable CXX); '
            f"install one, {mend}"
        )


def _tensorboard_is_there(config: JobConfig) -> None:
    if config.metrics.enable_tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "metrics.enable_tensorboard = true needs tensorboard, which is not installed: pip install tensorboard, or "
            "set it to false"
        )


def _make_writable(folder: Path, folders: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'job.dump_folder = "{folder}": cannot be made: {error.strerror}; choose another') from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'job.dump_folder = "{folder}": is not writable; choose another or change its permissions')
    for name in ("config.json", *LINE_FILES):
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name}: is not a file, and the run writes one there; move it away")
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise UserError(f"{folder / name}: is not a folder, and the run writes one there; move it away")
        if (folder / name).exists() and not os.access(folder / name, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{folder / name}: cannot be read and written; change its permissions")


def _resume_needs_checkpoints_on(plan: JobPlan) -> None:
    if not plan.config.checkpoint.enable and (steps := published_steps(plan.checkpoint_folder)):
        raise UserError(
            f"{plan.folder}: holds checkpoints up to step {steps[-1]}, and checkpoint.enable = false would start over; "
            "set it to true to resume, or choose another job.dump_folder"
        )


def _named_checkpoints_exist(plan: JobPlan) -> None:
    section, steps = plan.config.checkpoint, published_steps(plan.checkpoint_folder)
    if section.enable and section.load_step != -1 and section.load_step not in steps:
        raise UserError(
            f"checkpoint.load_step = {section.load_step}: {plan.checkpoint_folder} has no such checkpoint; there are: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    if section.initial_load_path and not steps:
        find_checkpoint(section.initial_load_path)


def _refuse_another_run(plan: JobPlan, prepared: Prepared) -> None:
    """A run folder continues the run that made it, or nothing."""
    path = plan.folder / "config.json"
    if not path.exists():
        if published_steps(plan.checkpoint_folder):
            raise UserError(f"{plan.folder}: holds checkpoints but no config.json; choose another job.dump_folder")
        return
    try:
        before = flat(json.loads(path.read_text())["identity"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not a config.json of ours; choose another job.dump_folder or remove it") from None
    now = flat(json.loads(json.dumps(identity(plan, prepared))))
    for key in sorted(before | now):
        # What an earlier version did not have, and this one leaves at none, is the same.
        was, value = before.get(key), now.get(key)
        if was != value:
            raise UserError(
                f"{plan.folder}: its run has {key} = {was}, this one {value}, which may not change on a resume; "
                "choose another job.dump_folder or set it back"
            )
