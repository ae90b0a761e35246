"""Entry of one rank: `torchrun ... -m torchtitan_lite.train RECIPE.toml [--section.key=value ...]`."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from torchtitan_lite.checkpoint.storage import published_steps
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.logging import setup_logging
from torchtitan_lite.preflight import JobPlan, finished_step, flat, identity, plan_job, prepare_job

logger = logging.getLogger("torchtitan_lite")


def main(arguments: Sequence[str]) -> int:
    """Train; return the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        setup_logging(rank=rank)
        if not arguments or arguments[0].startswith("--"):
            raise UserError("no recipe; name a TOML file first, as in train_configs/llama3_debug.toml")
        plan = plan_job(arguments[0], arguments[1:], int(os.environ.get("WORLD_SIZE", "1")))
        run(plan)
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(plan: JobPlan) -> None:
    """Prepare, start the process group, train, say where everything is."""
    for what, value in plan.derived():
        logger.info("%-8s  %s", what, value)
    prepared = prepare_job(plan)
    logger.info("data      %s tokens, %s held out", f"{prepared.train.tokens:,}", f"{prepared.validation.tokens:,}")
    if (step := finished_step(plan)) is not None:
        logger.info(already_finished(plan, step))
        return

    # Here, not above: a mistake in the recipe is answered before torch is paid for.
    from torchtitan_lite.distributed import runtime
    from torchtitan_lite.observability.sinks import RunLog
    from torchtitan_lite.run_record import write_config_json
    from torchtitan_lite.trainer import Trainer

    here = runtime.start(plan.config.comm, plan.config.debug)
    try:
        settings = flat(asdict(plan.config)) | flat(identity(plan, prepared))
        # A folder that is not shared between nodes would have some resume and others start.
        settings["checkpoints in the run folder"] = published_steps(plan.checkpoint_folder)
        runtime.require_equal_on_all_ranks(settings)
        if here.rank == 0:
            write_config_json(plan, identity(plan, prepared), here.device_name)
        Trainer(plan, prepared, here, RunLog(plan.folder, writes=here.rank == 0)).train()
    finally:
        runtime.stop()
    logger.info(where_it_is(plan))


def already_finished(plan: JobPlan, step: int) -> str:
    return (
        f"{plan.folder} already is at step {step} of {plan.config.training.steps}; go on with "
        f"--training.steps={2 * step}, or start another run with --job.dump_folder=FOLDER"
    )


def where_it_is(plan: JobPlan) -> str:
    """The last line: where everything was written, and how to go on."""
    metrics, steps = plan.config.metrics, plan.config.training.steps
    tensorboard = f"; tensorboard --logdir {plan.folder / metrics.save_tb_folder}" if metrics.enable_tensorboard else ""
    resume = f"; go on: --training.steps={2 * steps}" if plan.config.checkpoint.enable else ""
    return (
        f"all is in {plan.folder} (config.json, metrics.jsonl, events.jsonl){resume}{tensorboard}; "
        "change a key: --optimizer.lr=1e-3 --job.dump_folder=outputs/another"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
