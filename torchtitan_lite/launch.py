"""The launcher under run_train.sh: preflight without torch, then torchrun in this process."""

import os
import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):  # not ignored
    # No exception among imports, a model's from outside too: some of what torch imports swallows every one.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import gc
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torchtitan_lite.checkpoint.storage import published_steps
from torchtitan_lite.config import load_config
from torchtitan_lite.distributed.environment import accelerators, cores, count_from
from torchtitan_lite.elastic.nodes import (
    Nodes,
    nodes_from_environment,
    rendezvous_arguments,
    rendezvous_id,
    restarts_from_environment,
)
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.logging import setup_logging, shown_ranks, without_colours
from torchtitan_lite.preflight import JobPlan, finished_step, plan_job, prepare_job, run_folder_held
from torchtitan_lite.run_record import read_stopped
from torchtitan_lite.train import LAUNCHER, already_finished

DEFAULT_RECIPE = Path(__file__).parent.parent / "train_configs" / "llama3_debug.toml"

logger = logging.getLogger("torchtitan_lite")


def main(arguments: Sequence[str]) -> int:
    """Check a recipe, prepare its data, run it on NPROC ranks of each of NNODES nodes; return the exit code."""
    try:
        setup_logging()
        recipe, overrides = split_recipe(arguments)
        nodes, ranks = nodes_from_environment(), count_from("NPROC", accelerators() or 2)
        restarts = restarts_from_environment(nodes)
        shown_ranks(nodes.most * ranks)
        # Cores over ranks; torch takes its own number of threads from this too.
        os.environ["OMP_NUM_THREADS"] = str(count_from("OMP_NUM_THREADS", max(1, cores() // ranks)))
        rendezvous = rendezvous_arguments(nodes)
        if not nodes.fixed:
            _require_sizes(recipe, overrides, nodes, ranks)
        plan = plan_job(recipe, overrides, nodes.most * ranks)
        if plan.config.metrics.disable_color_printing:
            without_colours()
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what is half prepared is taken away
        prepare_job(plan)
        # For an answer before torch is imported; rank 0 takes it for good. Launchers of several nodes would collide.
        with run_folder_held(plan.folder) if nodes.most == 1 else nullcontext():
            pass
        if (step := finished_step(plan)) is not None:
            logger.info(already_finished(plan, step))
            return 0
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if nodes.most > 1:
        endpoint = os.environ["RDZV_ENDPOINT"]
        logger.info("waiting for %s nodes at %s; started again %d times at most", nodes, endpoint, restarts)
    if not nodes.fixed:
        # Else torch 2.13's agents keep the first world's store, whose address a node that joins later never learns.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER] = str(os.getpid())
    # Ranks that cannot leave in time say so themselves, a moment before they are killed.
    patience = plan.config.elastic.grace_seconds + 2
    command = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *rendezvous]
    command += [
        f"--shutdown-timeout={patience}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m",
        "torchtitan_lite.train",
    ]
    return _torchrun([*command, str(recipe), *overrides], plan)


def _require_sizes(recipe: Path, overrides: Sequence[str], nodes: Nodes, ranks: int) -> None:
    """Raise UserError where the run cannot have the least or the most nodes; warn of numbers between."""
    config, fits, reasons = load_config(recipe, overrides), [], {}
    if config.training.global_batch_size == -1:
        raise UserError(
            f"NNODES={nodes}: training.global_batch_size = -1 would follow the number of ranks, and with it what "
            "a step is; set it to a number"
        )
    if config.checkpoint.load_step != -1:
        raise UserError(
            f"NNODES={nodes}: checkpoint.load_step = {config.checkpoint.load_step} would go back each time that the "
            "nodes change; start with a fixed NNODES first"
        )
    for count in range(nodes.least, nodes.most + 1):
        try:
            plan_job(recipe, overrides, count * ranks)
            fits.append(count)
        except UserError as error:
            reasons[count] = str(error)
    told = f"node counts that fit: {', '.join(map(str, fits)) or 'none'}"
    for count, reason in reasons.items():
        line = f"NNODES={nodes}: {count} nodes of NPROC={ranks} do not fit: {reason}; {told}"
        if count in (nodes.least, nodes.most):
            raise UserError(line)
        logger.warning("%s", line)


def _stopped_by(number: signal.Signals, plan: JobPlan) -> int:
    """Say what is kept; return the exit code, as a shell has it."""
    steps = published_steps(plan.checkpoint_folder)
    begin = f"resumes from step {steps[-1]}" if steps else "begins anew, there is no checkpoint yet"
    stopped = read_stopped(plan.folder)
    at_step = f" at step {stopped['step']}" if stopped else ""
    print(f"stopped by {number.name}{at_step}; the next start {begin}", file=sys.stderr)
    return 128 + number


def split_recipe(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe (the default one where the first argument is an override) and the overrides."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), list(arguments[1:])
    return DEFAULT_RECIPE, list(arguments)


def _torchrun(command: list[str], plan: JobPlan) -> int:
    """Run torchrun's own entry; it returns after the last rank, and passes signals on to all of them."""
    # While torch is imported, as above.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    gc.disable()  # what is imported stays
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError as Closed
    from torch.distributed.elastic.rendezvous import RendezvousError

    gc.enable()
    # The ranks have printed what went wrong; the agent's own account of it is a page long.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        signal.signal(signal.SIGINT, before)
        run.main(command)
    except SignalException as stopped:
        return _stopped_by(stopped.sigval, plan)
    except RendezvousError as error:
        mend = f"; RDZV_ID={rendezvous_id()} is over there, choose another" if isinstance(error, Closed) else ""
        print(f"error: the nodes did not meet: {' '.join(str(error).split())}{mend}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except ChildFailedError as failed:
        if any(failure.exitcode == 2 for failure in failed.failures.values()):
            return 2  # a rank has said which mistake it is
        rank, first = failed.get_first_failure()
        how = signal.Signals(-first.exitcode).name if first.exitcode < 0 else f"exit code {first.exitcode}"
        print(f"error: rank {rank} failed first, with {how}; what it printed stands above", file=sys.stderr)
        return 1
    if (told := read_stopped(plan.folder)) is not None:  # the ranks were, and not this launcher
        return _stopped_by(signal.Signals[told["signal"]], plan)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
