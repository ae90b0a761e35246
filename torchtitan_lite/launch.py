"""The launcher under run_train.sh: preflight without torch, then torchrun in this process."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.logging import setup_logging
from torchtitan_lite.preflight import finished_step, plan_job, prepare_job
from torchtitan_lite.train import already_finished

DEFAULT_RECIPE = Path(__file__).parent.parent / "train_configs" / "llama3_debug.toml"

logger = logging.getLogger("torchtitan_lite")


def main(arguments: Sequence[str]) -> int:
    """Check a recipe, prepare its data, run it on NPROC ranks of each of NNODES nodes; return the exit code."""
    try:
        setup_logging()
        recipe, overrides = split_recipe(arguments)
        nodes, ranks = _count("NNODES", 1), _count("NPROC", _accelerators() or 2)
        rendezvous = _rendezvous(nodes)
        plan = plan_job(recipe, overrides, nodes * ranks)
        prepare_job(plan)
        if (step := finished_step(plan)) is not None:
            logger.info(already_finished(plan, step))
            return 0
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    # Cores over ranks; torch takes its own number of threads from this too.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", *rendezvous, "-m", "torchtitan_lite.train"]
    return _torchrun([*command, str(recipe), *overrides])


def split_recipe(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe (the default one where the first argument is an override) and the overrides."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), list(arguments[1:])
    return DEFAULT_RECIPE, list(arguments)


def _count(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{variable}={text}: expected a whole number of at least 1")
    return int(text)


def _rendezvous(nodes: int) -> list[str]:
    endpoint = os.environ.get("RDZV_ENDPOINT", "")
    if nodes == 1 and not endpoint:
        return ["--standalone"]  # a free port of this machine
    if not endpoint:
        raise UserError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT, the same on every node")
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=torchtitan_lite"]


def _accelerators() -> int:
    """Accelerators of this machine that are visible, counted without torch; 0 where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    nvidia = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()]
    amd = list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []
    return len(nvidia) or len(amd)


def _torchrun(command: list[str]) -> int:
    """Run torchrun's own entry; it returns after the last rank, and passes signals on to all of them."""
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except KeyboardInterrupt:
        return 130
    # The ranks have printed what went wrong; the agent's own account of it is a page long.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(command)
    except SignalException as stopped:
        print(f"stopped by {stopped.sigval.name}; the next start resumes from the last checkpoint", file=sys.stderr)
        return 128 + int(stopped.sigval)
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
