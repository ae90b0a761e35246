"""FSDP2's reductions over gloo: shards sent to their owners and summed there, while the backward goes on.

gloo's reduce-scatter is an all-reduce of which most is thrown away, and it is waited for where it is started: each rank
stands still until the slowest has come as far. An all-to-all sends the least that there is, and its sum can wait until
something asks for it.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

# Sums that may be under way at a time: each holds a unit's gradients twice, what is sent and what comes.
_UNDER_WAY = 4


def communicate_while_computing(units: Iterable[FSDPModule]) -> None:
    """Have a model's units, in place, gather and reduce over gloo without waiting where they start to."""
    late = LateSums()
    for unit in units:
        unit._set_unshard_async_op(True)
        group = unit._get_fsdp_state()._fsdp_param_group
        if group is not None:  # of a module whose parameters are all other units'
            unit.set_custom_reduce_scatter(ExchangedSums(group, late))


class LateSums:
    """The sums of a model's units that have not been taken yet, oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[dist.Work, Tensor, Tensor]] = deque()

    def add(self, work: dist.Work, received: Tensor, output: Tensor) -> None:
        """Take the sum of `received` over its first dim into `output` once `work` is done, by the end of the backward
        pass that this is called in."""
        if not self._waiting:
            Variable._execution_engine.queue_callback(lambda: self.take(0))
        self._waiting.append((work, received, output))
        self.take(_UNDER_WAY)

    def take(self, left: int) -> None:
        """Take the oldest sums until so many are left."""
        while len(self._waiting) > left:
            _sum_up(*self._waiting.popleft())


class ExchangedSums(ReduceScatter):
    """A unit's reduce-scatter, in the place of torch's own.

    What FSDP does with the result before the backward ends decides whether it may come late: it only cuts it into
    gradients, unless it divides it, adds it to ones that are there, sums it over replicas, or copies it to the host.
    """

    def __init__(self, group: FSDPParamGroup, late: LateSums) -> None:
        self._group, self._late = group, late

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(input_tensor)
        work = dist.all_to_all_single(received, input_tensor, group=group, async_op=True)
        assert work is not None
        rows = received.view(group.size(), -1)
        if self._may_come_late():
            self._late.add(work, rows, output_tensor)
        else:
            _sum_up(work, rows, output_tensor)

    def _may_come_late(self) -> bool:
        group = self._group
        return (
            torch._C._current_graph_task_id() != -1  # within a backward pass, whose end takes what is left
            and group.gradient_divide_factor == 1.0
            and not group._is_hsdp
            and all(each.sharded_param.grad is None and not each.offload_to_cpu for each in group.fsdp_params)
        )


def _sum_up(work: dist.Work, received: Tensor, output: Tensor) -> None:
    work.wait()
    torch.sum(received, dim=0, out=output)
