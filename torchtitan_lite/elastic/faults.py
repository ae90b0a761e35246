"""Steps whose numbers are wrong: judged on the device by all ranks alike, skipped, read by the host a step later."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.config.schema import Faults
from torchtitan_lite.data.passed_over import Ranges, merged, write_passed_over
from torchtitan_lite.distributed.runtime import from_first_rank
from torchtitan_lite.errors import UserError

# A good step's least weight in the running statistics, so that they follow a loss that falls over a long run.
_LEAST_SHARE = 0.01
_REASONS = ("non-finite loss", "non-finite gradient norm", "loss spike", "gradient norm spike")


@dataclass(frozen=True)
class Skipped:
    """A step that changed neither parameters nor optimizer.

    begin, end: positions in the global order between which its samples lie. limits: of loss and norm, above which they
    are spikes; inf where none is judged. in_a_row: steps skipped up to this one; row_begin: where the first one began.
    """

    step: int
    begin: int
    end: int
    loss: float
    grad_norm: float
    limits: tuple[float, float]
    why: tuple[str, ...]
    in_a_row: int
    row_begin: int

    @property
    def positions(self) -> tuple[int, int]:
        """Of the whole row."""
        return self.row_begin, self.end

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.record().items())

    def record(self) -> dict[str, Any]:
        """What events.jsonl says of it."""
        return {
            "why": ", ".join(self.why),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "loss_limit": self.limits[0],
            "grad_norm_limit": self.limits[1],
            "in_a_row": self.in_a_row,
        }


class Guard:
    """Judges steps by [faults]. Statistics are the same to the bit on every rank; collective, no host sync.

    Running mean and variance, of good steps only: each weighs as much as all before until there are 100, then 1%.
    """

    def __init__(self, section: Faults, device: torch.device) -> None:
        self._section, self._device = section, device
        # Of good steps: number, means and variances of (loss, norm). Of the row: steps skipped, position of the first.
        self._state = torch.zeros(7, dtype=torch.float64, device=device)
        sigmas = (section.loss_spike_sigmas, section.grad_norm_spike_sigmas)
        self._sigmas = torch.tensor(sigmas, dtype=torch.float64, device=device)
        self._first = dist.get_rank() == 0
        self._unread: deque[_Verdict] = deque()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps, in place; zeros are fresh statistics."""
        return {"faults.statistics": self._state}

    def forget_row(self) -> None:
        """Count skipped steps from none again, and drop verdicts that nobody has read."""
        self._state[5:].zero_()
        self._unread.clear()

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor, step: int, taken: tuple[int, int]) -> Tensor:
        """Whether to skip the step: float32 scalar, 1 or 0, on the device.

        loss: this rank's part, scalar; the parts of all ranks sum to the loss. grad_norm: global, scalar. taken:
        positions between which the step's samples lie.
        """
        # One collective makes all three the same everywhere: a verdict that differs would tear the ranks apart.
        said = torch.zeros(3, dtype=torch.float64, device=self._device)
        said[0] = loss
        if self._first:
            said[1] = grad_norm
        said[2] = ~grad_norm.isfinite()
        dist.all_reduce(said)
        values, finite = said[:2], said[:2].isfinite()
        finite[1] &= said[2] == 0
        count, means, variances, row = self._state[0], self._state[1:3], self._state[3:5], self._state[5:]
        judged = (self._sigmas > 0) & (count >= self._section.warmup_steps)
        limits = torch.where(judged, means + self._sigmas * variances.sqrt(), math.inf)
        reasons = torch.cat((~finite, finite & (values > limits)))
        skip = reasons.any()
        share = (1 / (count + 1)).clamp(min=_LEAST_SHARE)
        delta = values - means
        good = (count[None] + 1, means + share * delta, (1 - share) * (variances + share * delta.square()))
        begin = torch.where(row[0] == 0, float(taken[0]), row[1])
        bad = (self._state[:5], (row[0] + 1)[None], begin[None])
        self._state.copy_(torch.where(skip, torch.cat(bad), torch.cat((*good, torch.zeros_like(row)))))
        report = torch.cat((values, limits, row, reasons.to(values.dtype)))
        self._unread.append(_Verdict(step, taken, *_to_host(report)))
        return skip.to(torch.float32)

    def read(self, *, all_of_them: bool) -> list[Skipped]:
        """The steps skipped since the last call, in order; of the newest step only with all_of_them.

        The device is then a step ahead and does not wait for the host. Not by what has arrived: ranks must learn of a
        step at the same time.
        """
        kept = 0 if all_of_them else 1
        read = [self._unread.popleft().read() for _ in range(len(self._unread) - kept)]
        return [skipped for skipped in read if skipped is not None]


@dataclass(frozen=True)
class _Verdict:
    """report: on the host, complete once `arrived` has happened (None: at once)."""

    step: int
    taken: tuple[int, int]
    report: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> Skipped | None:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, loss_limit, norm_limit, in_a_row, row_begin, *reasons = self.report.tolist()
        why = tuple(reason for reason, holds in zip(_REASONS, reasons, strict=True) if holds)
        if not why:
            return None
        limits = (loss_limit, norm_limit)
        return Skipped(self.step, *self.taken, loss, norm, limits, why, int(in_a_row), int(row_begin))


def _to_host(report: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if report.device.type != "cuda":
        return report, None
    # Only a copy into pinned memory leaves the host free to go on.
    copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=True).copy_(report, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def why_stop(row: Skipped, section: Faults, passed_over: Ranges, saved: int) -> str:
    """What ends a run in which more steps than allowed were skipped up to `row`; empty where it is to roll back.

    saved: the step of the latest checkpoint, 0 where there is none.
    """
    told = (
        f"{row.in_a_row} steps in a row up to step {row.step} were skipped ({', '.join(row.why)}), more than "
        f"faults.max_in_a_row = {section.max_in_a_row}"
    )
    if section.then == "stop":
        mend = 'lower optimizer.lr, or set faults.then = "roll_back" to pass over such samples'
    elif not saved:
        mend = "there is no checkpoint to roll back to: lower optimizer.lr or checkpoint.interval, and start again"
    elif any(end == row.row_begin for _, end in passed_over):
        # No good step since the last roll back: it is not the data.
        mend = f"rolling back has not helped, all since position {row.row_begin} is bad too: lower optimizer.lr"
    else:
        return ""
    return f"{told}; events.jsonl has their samples; {mend}"


def pass_over(folder: Path, ranges: Ranges, row: Skipped) -> Ranges:
    """Add the row's positions to those that a run passes over, in its folder too. Collective; raises UserError."""
    ranges = merged([*ranges, row.positions])
    error = None
    if dist.get_rank() == 0:
        try:
            write_passed_over(folder, ranges)
        except UserError as caught:
            error = caught
    if (error := from_first_rank(error)) is not None:
        raise error
    return ranges


def step_unless(skip: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer; where `skip` is 1 parameters, moments and step counts stay as they are, to the bit.

    Fused kernels look at it on the device, as they do for a gradient scaler that has found an overflow. The others
    cannot: there the host waits for it.
    """
    if skip is None:
        optimizer.step()
    elif optimizer.defaults["fused"]:
        # Under CPU offload the optimizer runs on the host, which has waited for the gradients already.
        optimizer.found_inf = skip.to(optimizer.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()
