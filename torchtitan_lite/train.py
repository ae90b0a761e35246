"""Entry of one rank: `torchrun ... -m torchtitan_lite.train RECIPE.toml [--section.key=value ...]`."""

import gc
import signal

if __name__ == "__main__":
    # Before the imports: an interrupt among them would print a traceback. See also _die_with_the_launcher.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is imported stays; to look for garbage among it costs a tenth of a start. Training collects when it chooses.
    gc.disable()

import atexit
import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import NoReturn

from torchtitan_lite.checkpoint.storage import published_steps
from torchtitan_lite.config import JobConfig
from torchtitan_lite.data.prepare import Prepared
from torchtitan_lite.distributed.environment import environment_ranks, set_allocator
from torchtitan_lite.errors import Corruption, UserError
from torchtitan_lite.observability.logging import log_repeated, setup_logging, shown_ranks, without_colours
from torchtitan_lite.preflight import JobPlan, finished_step, identity, plan_job, prepare_job, run_folder_held
from torchtitan_lite.strict_json import flat

LAUNCHER = "TORCHTITAN_LITE_LAUNCHER"  # the variable with its process id

logger = logging.getLogger("torchtitan_lite")


def main(arguments: Sequence[str]) -> int:
    """Train; return the exit code: 0 done or stopped by a signal, 1 hardware that computes wrong numbers, 2 the user's
    mistake, 75 to be started again."""
    rank, world_size = environment_ranks()
    set_allocator()  # here: a recipe may name a model from outside, which imports torch
    try:
        setup_logging(shown=rank in shown_ranks(world_size), rank=rank)
        if not arguments or arguments[0].startswith("--"):
            raise UserError("no recipe; name a TOML file first, as in train_configs/llama3_debug.toml")
        plan = plan_job(arguments[0], arguments[1:], world_size)
        return run(plan, rank)
    except (UserError, Corruption) as error:
        print(error.line(), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def run(plan: JobPlan, rank: int) -> int:
    """Prepare, train, say where everything is; return the exit code."""
    if plan.config.metrics.disable_color_printing:
        without_colours()
    if len(plan.origin.chain) > 1:
        logger.info("recipe    %s", plan.origin)
    for what, value in plan.derived():
        logger.info("%-8s  %s", what, value)
    for warning in plan.warnings():
        logger.warning("%s", warning)
    prepared = prepare_job(plan)
    train, held_out = prepared.tokens()
    logger.info("data      %s tokens, %s held out", f"{train:,}", f"{held_out:,}")
    with run_folder_held(plan.folder, _patience_s()) if rank == 0 else nullcontext():
        code = _train(plan, prepared)
    log_repeated()
    return code


def _patience_s() -> float:
    """Where torchrun starts ranks again, the first rank before may be on another node, and about to end."""
    return 20.0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else 0.0


def _train(plan: JobPlan, prepared: Prepared) -> int:
    # Here, not above: a mistake in the recipe is answered before torch is paid for.
    from torchtitan_lite.distributed import runtime
    from torchtitan_lite.elastic.watchdog import Watchdog
    from torchtitan_lite.observability.sinks import RunLog
    from torchtitan_lite.profiling.memory import memory_watched
    from torchtitan_lite.profiling.phases import phases_recorded
    from torchtitan_lite.run_record import write_config_json
    from torchtitan_lite.trainer import Trainer

    comm = plan.config.comm
    runtime.record_collectives(comm, plan.folder / comm.save_traces_folder)
    here = runtime.start(comm, plan.config.debug)
    try:
        if here.device.type == "cpu":
            _without_accelerator(plan.config)
        runtime.prefer_cudnn_attention(here.device, plan.config.training.seq_len, plan.dims.cp)
        settings = flat(asdict(plan.config)) | flat(identity(plan, prepared))
        if plan.pipeline is not None:
            settings["the schedule file's order"] = plan.pipeline.order
        # A folder that is not shared between nodes would have some resume and others start.
        settings["checkpoints in the run folder"] = published_steps(plan.checkpoint_folder)
        runtime.require_equal_on_all_ranks(settings)
        step = finished_step(plan, here.rank, here.world_size)
        if runtime.same_on_all_ranks(step) and step is not None:
            logger.info(already_finished(plan, step))
            return 0
        if here.rank == 0:
            write_config_json(plan, identity(plan, prepared), here.device_name)
        log = RunLog(plan.folder, writes=here.rank == 0)
        with (
            phases_recorded(plan.config.profiling, plan.folder, here, log.attempt),
            Watchdog(comm, plan.folder, here, log.event) as watchdog,
            memory_watched(plan.config, plan.folder, here, watchdog.at),
        ):
            trainer = Trainer(plan, prepared, here, log, watchdog)
            try:
                stopped_by = trainer.train()
            finally:
                trainer.close()
    finally:
        runtime.stop()
    if not stopped_by:
        logger.info(where_it_is(plan))
    return trainer.exit_code(stopped_by)


def _without_accelerator(config: JobConfig) -> None:
    """Say what is slow or useless on a CPU. Raises UserError for what does not run there."""
    if config.parallelism.enable_async_tensor_parallel:
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true needs CUDA's symmetric memory, and this torch has no "
            "CUDA; set it to false"
        )
    if config.profiling.enable_memory_snapshot:
        raise UserError(
            "profiling.enable_memory_snapshot = true keeps the history of CUDA's allocator, and this torch has no "
            "CUDA; set it to false"
        )
    if config.training.mixed_precision_param != "float32":
        logger.info(
            'bfloat16 is many times slower than float32 on most CPUs: training.mixed_precision_param = "float32"'
        )
    if config.checkpoint.enable and config.checkpoint.async_mode == "async_with_pinned_mem":
        logger.info(
            'checkpoint.async_mode = "async_with_pinned_mem": no CUDA, so the copies that are kept are not pinned'
        )
    if config.training.enable_cpu_offload:
        logger.warning("training.enable_cpu_offload = true saves nothing: this machine has host memory only")


def already_finished(plan: JobPlan, step: int) -> str:
    return (
        f"{plan.folder} already is at step {step} of {plan.config.training.steps}; go on with "
        f"--training.steps={2 * step}, or start another run with --job.dump_folder=FOLDER"
    )


def where_it_is(plan: JobPlan) -> str:
    """The last line: where everything was written, and how to go on."""
    metrics, steps = plan.config.metrics, plan.config.training.steps
    # The folder above has the other runs beside this one; a run right in the current or the top folder has it alone.
    logdir = plan.folder.parent if plan.folder.parent.name else plan.folder
    tensorboard = f"; tensorboard --logdir {logdir}" if metrics.enable_tensorboard else ""
    resume = f"; go on: --training.steps={2 * steps}" if plan.config.checkpoint.enable else ""
    return (
        f"all is in {plan.folder} (config.json, metrics.jsonl, events.jsonl){resume}{tensorboard}; "
        "change a key: --optimizer.lr=1e-3 --job.dump_folder=outputs/another"
    )


def _die_with_the_launcher() -> None:
    """End at once when the launcher is killed, as on Ctrl-C: ranks that train on would write beside the next start.

    Ctrl-C has its default action since the first line: Python's own handler would wait for the collective or the
    rendezvous that the rank is in.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != launcher:  # killed before: the signal would never come
            os._exit(1)


def _leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart: a thread of gloo's that lets go of a tensor meanwhile is
    stopped where it may not be, and the process ends with SIGABRT, though the run is whole."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it may have gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _die_with_the_launcher()
    _leave(main(sys.argv[1:]))
