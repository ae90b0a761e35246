"""What ranks tell each other at the end of each step, so that all of them save, retry and stop at the same one."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Agreed:
    """The same on every rank. stop: number of a signal that some rank has received, 0 for none. written: every rank is
    done with its part of the save in flight. due: the first rank's clock says that it is time for a checkpoint."""

    stop: int
    written: bool
    due: bool


def agree(stop: int, written: bool, due: bool) -> Agreed:
    """Put together what ranks say. Collective, among hosts only: it does not wait for a device."""
    said = torch.tensor([stop, not written, due and dist.get_rank() == 0], dtype=torch.int64)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    number, unwritten, is_due = said.tolist()
    return Agreed(number, not unwritten, bool(is_due))
