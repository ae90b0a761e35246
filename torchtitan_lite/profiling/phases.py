"""Phases of a run, recorded where its recipe asks for them."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torchtitan_lite.config.schema import Profiling
from torchtitan_lite.distributed.clocks import shared_clock
from torchtitan_lite.distributed.runtime import Runtime, from_first_rank
from torchtitan_lite.observability import phases


def phases_recorded(section: Profiling, folder: Path, here: Runtime, attempt: int) -> AbstractContextManager[None]:
    """folder, attempt: of the run; the first rank's attempt counts. Collective where phases are recorded."""
    if not section.phases:
        return nullcontext()
    ranks = {"world_size": here.world_size, "attempt": from_first_rank(attempt)}
    return phases.recorded(folder, here.rank, shared_clock(), **ranks)
