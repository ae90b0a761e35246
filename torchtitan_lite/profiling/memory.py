"""What a device's memory holds: snapshots of the CUDA allocator, and what to do where memory has run out."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.distributed.runtime import Runtime
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.memory import peak_memory_gib

_GIB = 1 << 30
_ENTRIES = 100_000  # allocations and frees that the history keeps, the last ones
_ON_HOST = "DefaultCPUAllocator"  # in the message of a RuntimeError: torch has no class for it there

logger = logging.getLogger(__name__)


def write_snapshot(folder: Path, iteration: str, rank: int) -> Path | None:
    """Write what the allocator holds and its history, for pytorch.org/memory_viz; None where it cannot be written."""
    started, path = time.perf_counter(), folder / f"iteration_{iteration}" / f"rank{rank}_memory_snapshot.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        logger.warning("%s: cannot be written: %s", path, error.strerror)
        return None
    logger.info("snapshot  of memory in %s, written in %.1f s", path, time.perf_counter() - started)
    return path


@contextmanager
def memory_watched(config: JobConfig, folder: Path, here: Runtime, at: Callable[[], tuple[str, int]]) -> Iterator[None]:
    """Keeps the allocator's history where the recipe asks for it, and turns running out of memory into a UserError.

    folder: of the run. at: the phase and the step that this rank is at.
    """
    section, device = config.profiling, here.device
    if section.enable_memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and _ON_HOST not in str(error):
            raise
        phase, step = at()
        snapshots, written = folder / section.save_memory_snapshot_folder, None
        if section.enable_memory_snapshot:
            written = write_snapshot(snapshots, f"{step}_exit", here.rank)
        look = f"; what it held is in {written}" if written else ""
        raise UserError(f"{_ran_out(str(error), here, phase, step)}; {_mend(config, device)}{look}") from None
    finally:
        if section.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)


def _ran_out(error: str, here: Runtime, phase: str, step: int) -> str:
    device = here.device
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
    more = f", and {asked[1]} more were asked for" if asked else ""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / _GIB
        used = torch.cuda.max_memory_allocated(device) / _GIB
        peak = f"at its peak it held {used:.2f} GiB of {peak_memory_gib(device):.2f} reserved, of {total:.2f} there are"
    else:
        peak = f"at its peak the process held {peak_memory_gib(device):.2f} GiB"
    return f"rank {here.rank} ran out of memory at step {step}, {phase}: {peak}{more}"


def _mend(config: JobConfig, device: torch.device) -> str:
    """What of the recipe is left to be changed, the cheapest first."""
    training, staged = config.training, config.parallelism.pipeline_parallel_degree > 1
    samples = "parallelism.pipeline_parallel_microbatch_size" if staged else "training.local_batch_size"
    size = config.parallelism.pipeline_parallel_microbatch_size if staged else training.local_batch_size
    mode = config.activation_checkpoint.mode
    ways = (
        (size > 1, f"lower {samples} = {size}"),
        (mode != "full", f'set activation_checkpoint.mode = "full" (it is "{mode}")'),
        (training.loss_chunks == 1, "raise training.loss_chunks = 1"),
        (config.optimizer.state_dtype == "float32", 'set optimizer.state_dtype = "bfloat16"'),
        (device.type == "cuda" and not training.enable_cpu_offload, "set training.enable_cpu_offload = true"),
    )
    left = [way for possible, way in ways if possible][:3]
    return ", ".join([*left, "or shard over more ranks" if left else "shard over more ranks"])
