"""torch's AdamW on moments that are kept in less than float32."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from torchtitan_lite.optim.states import Kept, State, gradient_rows, own, rows_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW has them
_AT_ONCE = 1 << 24  # numbers whose moments are in float32 at one time

_Rows = tuple[nn.Parameter, slice]


class KeptAdamW(torch.optim.Optimizer):
    """Some rows at a time: their moments are read, stepped by torch's functions in float32, and written.

    implementation: as torch's of that name. found_inf: as for torch's fused, of numbers that come out of a write as
    they went in: those in bfloat16.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, lr: float, eps: float, implementation: str, kept: Kept
    ) -> None:
        self._fused, self._foreach = implementation == "fused", implementation == "foreach"
        exact = kept.dtype == torch.bfloat16
        super().__init__(groups, {"lr": lr, "eps": eps, "fused": self._fused and exact})
        self._kept = kept

    def new_state(self, parameter: Tensor) -> State:
        step = torch.zeros((), device=own(parameter).device if self._fused else "cpu")
        moments = [self._kept.new(parameter, key) for key in MOMENTS]
        return {"step": step, **moments[0], **moments[1]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            members = [each for each in group["params"] if each.grad is not None]
            for each in members:
                if not self.state[each]:
                    self.state[each] = self.new_state(each)
            for rows in _batches(members):
                self._step(rows, group)
            for each in members:
                self.state[each]["step"] += 1 if self.found_inf is None else 1 - self.found_inf

    def _step(self, batch: Sequence[_Rows], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter, _ in batch]
        means, squares = (
            [self._kept.read(state, key, rows) for state, (_, rows) in zip(states, batch, strict=True)]
            for key in MOMENTS
        )
        adamw(
            [rows_of(parameter)[rows] for parameter, rows in batch],
            [gradient_rows(parameter)[rows] for parameter, rows in batch],
            means,
            squares,
            [],
            [state["step"].clone() for state in states],  # a parameter may come in parts
            foreach=self._foreach,
            fused=self._fused,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state, (_, rows), *moments in zip(states, batch, means, squares, strict=True):
            for key, moment in zip(MOMENTS, moments, strict=True):
                self._kept.write(state, key, moment, rows)


def _batches(parameters: Iterable[nn.Parameter]) -> Iterator[list[_Rows]]:
    """All rows of the parameters, at most _AT_ONCE numbers in one list, but for a row that has more."""
    batch: list[_Rows] = []
    free = _AT_ONCE
    for parameter in parameters:
        count, columns = rows_of(parameter).shape
        height = max(1, _AT_ONCE // max(1, columns))
        for start in range(0, count if columns else 0, height):
            rows = slice(start, min(start + height, count))
            numbers = (rows.stop - rows.start) * columns
            if batch and numbers > free:
                yield batch
                batch, free = [], _AT_ONCE
            batch.append((parameter, rows))
            free -= numbers
    if batch:
        yield batch
