"""The launcher under run_train.sh: preflight without torch, then torchrun in this process."""

import os
import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):  # not ignored
    # No exception among imports, a model's from outside too: some of what torch imports swallows every one.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torchtitan_lite.checkpoint.storage import published_steps
from torchtitan_lite.distributed.environment import accelerators, cores, count_from
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.logging import setup_logging, shown_ranks
from torchtitan_lite.preflight import JobPlan, finished_step, plan_job, prepare_job, run_folder_held
from torchtitan_lite.run_record import read_stopped
from torchtitan_lite.train import already_finished

DEFAULT_RECIPE = Path(__file__).parent.parent / "train_configs" / "llama3_debug.toml"

logger = logging.getLogger("torchtitan_lite")


def main(arguments: Sequence[str]) -> int:
    """Check a recipe, prepare its data, run it on NPROC ranks of each of NNODES nodes; return the exit code."""
    try:
        setup_logging()
        recipe, overrides = split_recipe(arguments)
        nodes, ranks = count_from("NNODES", 1), count_from("NPROC", accelerators() or 2)
        shown_ranks(nodes * ranks)
        # Cores over ranks; torch takes its own number of threads from this too.
        os.environ["OMP_NUM_THREADS"] = str(count_from("OMP_NUM_THREADS", max(1, cores() // ranks)))
        rendezvous = _rendezvous(nodes)
        plan = plan_job(recipe, overrides, nodes * ranks)
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what is half prepared is taken away
        prepare_job(plan)
        # For an answer before torch is imported; rank 0 takes it for good. Launchers of several nodes would collide.
        with run_folder_held(plan.folder) if nodes == 1 else nullcontext():
            pass
        if (step := finished_step(plan)) is not None:
            logger.info(already_finished(plan, step))
            return 0
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if nodes > 1:
        logger.info("waiting for %d nodes at %s", nodes, os.environ["RDZV_ENDPOINT"])
    # Ranks that cannot leave in time say so themselves, a moment before they are killed.
    patience = plan.config.elastic.grace_seconds + 2
    command = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", *rendezvous, f"--shutdown-timeout={patience}"]
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "torchtitan_lite.train"]
    return _torchrun([*command, str(recipe), *overrides], plan)


def _what_is_kept(plan: JobPlan) -> str:
    steps = published_steps(plan.checkpoint_folder)
    begin = f"resumes from step {steps[-1]}" if steps else "begins anew, there is no checkpoint yet"
    stopped = read_stopped(plan.folder)
    at_step = f" at step {stopped['step']}" if stopped else ""
    return f"{at_step}; the next start {begin}"


def split_recipe(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe (the default one where the first argument is an override) and the overrides."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), list(arguments[1:])
    return DEFAULT_RECIPE, list(arguments)


def _rendezvous(nodes: int) -> list[str]:
    endpoint = os.environ.get("RDZV_ENDPOINT", "")
    if nodes == 1 and not endpoint:
        return ["--standalone"]  # a free port of this machine
    if not endpoint:
        raise UserError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT, the same on every node")
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: expected HOST:PORT, as in node0:29500")
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=torchtitan_lite"]


def _torchrun(command: list[str], plan: JobPlan) -> int:
    """Run torchrun's own entry; it returns after the last rank, and passes signals on to all of them."""
    # While torch is imported, as above.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    signal.signal(signal.SIGINT, before)
    # The ranks have printed what went wrong; the agent's own account of it is a page long.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(command)
    except SignalException as stopped:
        print(f"stopped by {stopped.sigval.name}{_what_is_kept(plan)}", file=sys.stderr)
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        print(f"error: the nodes did not meet: {' '.join(str(error).split())}", file=sys.stderr)
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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
