"""Muon (Keller Jordan, kellerjordan.github.io/posts/muon; arXiv:2502.16982): momentum, each matrix of which is brought
to singular values near one. On sharded parameters it is the whole matrix.

Momentum stays as the parameter is sharded. Ranks that share matrices, or have copies of them, deal them out: each
gathers the parts of one, orthogonalises it and sends the parts back. So a matrix is orthogonalised once, copies stay
the same bits, and no rank holds more than one whole.

Shapes: S matrices in a stack, of R rows and C columns, of which a rank holds r and c.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from torchtitan_lite.optim.states import ALL, Kept, State, gradient_rows, own, rows_of

MOMENTUM = "momentum_buffer"  # as torch.optim.Muon has it
# The polynomial of degree five whose iteration brings singular values near one (the post above).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST_NORM = 1e-7
# By what an update of R x C is scaled: to the root mean square that AdamW's has (arXiv:2502.16982), or as in the post.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def orthogonalised(x_SRC: Tensor, steps: int) -> Tensor:
    """Matrices of the same singular vectors with singular values near one, by so many steps of Newton and Schulz."""
    tall = x_SRC.shape[1] > x_SRC.shape[2]
    x = x_SRC.mT if tall else x_SRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


@dataclass(frozen=True)
class Sharing:
    """The ranks that hold the same matrices. Of each rank, in the group's order, parts: its rows and columns. copies:
    what those have in common that hold one copy between them."""

    group: dist.ProcessGroup
    parts: tuple[tuple[slice, slice], ...]
    copies: tuple[tuple[int, ...], ...]

    def of_copy(self, rank: int) -> list[tuple[slice, slice] | None]:
        """The parts that make the copy of `rank`, each in the place of its rank."""
        mine = self.copies[rank]
        return [part if copy == mine else None for part, copy in zip(self.parts, self.copies, strict=True)]


@dataclass(frozen=True)
class _Matrix:
    """One of a parameter's; rows: where it lies among this rank's, see rows_of."""

    parameter: nn.Parameter
    rows: slice
    sharing: Sharing


class Muon(torch.optim.Optimizer):
    """Of matrices [R, C] and stacks of them [S, R, C]. To be made by all ranks that share some, in the same order.

    It computes on the mesh's device, in bfloat16 where that is an accelerator.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        ns_steps: int,
        adjust_lr_fn: str,
        kept: Kept,
    ) -> None:
        super().__init__(groups, {"lr": lr, "fused": False})
        self._decay, self._steps, self._scale, self._kept = momentum, ns_steps, _SCALES[adjust_lr_fn], kept
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._sharing = {each: sharing_of(each, made) for group in self.param_groups for each in group["params"]}

    def new_state(self, parameter: Tensor) -> State:
        return self._kept.new(parameter, MOMENTUM)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shared: dict[dist.ProcessGroup, list[_Matrix]] = defaultdict(list)
            for parameter in (each for each in group["params"] if each.grad is not None):
                self._accumulate(parameter)
                rows_of(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                if (sharing := self._sharing[parameter]) is not None:
                    shared[sharing.group] += [_Matrix(parameter, rows, sharing) for rows in _stacked(parameter)]
                elif own(parameter).numel():
                    updates = self._update(parameter, ALL).view(-1, *parameter.shape[-2:])
                    whole = orthogonalised(updates, self._steps)
                    self._apply(parameter, ALL, whole.flatten(0, 1), group["lr"])
            for ranks, matrices in shared.items():
                self._deal(matrices, ranks, group["lr"])

    def _deal(self, matrices: list[_Matrix], ranks: dist.ProcessGroup, lr: float) -> None:
        """Step matrices that `ranks` share: at a time as many as there are ranks, alike in size, one for each."""
        matrices = sorted(matrices, key=lambda each: prod(each.parameter.shape[-2:]), reverse=True)
        here = ranks.rank()
        for start in range(0, len(matrices), ranks.size()):
            turn = matrices[start : start + ranks.size()]
            updates = [self._update(each.parameter, each.rows) for each in turn]
            # A rank's matrix comes from its own copy, and goes to all of them.
            sent = [
                update if each.sharing.copies[owner] == each.sharing.copies[here] else update[:0]
                for owner, (each, update) in enumerate(zip(turn, updates, strict=True))
            ]
            mine = turn[here] if here < len(turn) else None
            places = [] if mine is None else mine.sharing.of_copy(here)
            parts = _exchanged(sent, [_size(place) for place in places], ranks, updates[0])
            if mine is not None:
                whole = parts[0].new_empty(mine.parameter.shape[-2:])
                for place, part in zip(places, parts, strict=True):
                    if place is not None:
                        whole[place] = part.view(whole[place].shape)
                whole = orthogonalised(whole[None], self._steps)[0]
                parts = [whole[place] for place in mine.sharing.parts]
            back = _exchanged(parts, [update.numel() for update in updates], ranks, updates[0])
            for each, update, part in zip(turn, updates, back, strict=True):
                self._apply(each.parameter, each.rows, part.view(update.shape), lr)

    def _accumulate(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            state |= self.new_state(parameter)
        momentum = self._kept.read(state, MOMENTUM)
        momentum.lerp_(gradient_rows(parameter), 1 - self._decay)
        self._kept.write(state, MOMENTUM, momentum)

    def _update(self, parameter: nn.Parameter, rows: slice) -> Tensor:
        """What is to be orthogonalised: the momentum as the same gradient once more would make it (Nesterov's)."""
        grad, momentum = gradient_rows(parameter)[rows], self._kept.read(self.state[parameter], MOMENTUM, rows)
        device = torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else grad.device
        # A CPU takes longer for products in bfloat16.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return grad.lerp(momentum, self._decay).to(device, dtype)

    def _apply(self, parameter: nn.Parameter, rows: slice, update: Tensor, lr: float) -> None:
        weights = rows_of(parameter)[rows]
        weights.add_(update.to(weights.device), alpha=-lr * self._scale(*parameter.shape[-2:]))


def sharing_of(parameter: Tensor, made: dict[tuple[int, ...], dist.ProcessGroup]) -> Sharing | None:
    """Who else holds its matrices; None where no one does, or they are stacks of whole ones, to be stepped as they are.

    made: groups of ranks over several axes of a mesh, each to be made once. Collective among those ranks.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, placements, here = parameter.device_mesh, parameter.placements, parameter.device_mesh.get_coordinate()
    assert here is not None
    longer = {axis: placement for axis, placement in enumerate(placements) if mesh.size(axis) > 1}
    copied = [axis for axis, placement in longer.items() if placement.is_replicate()]
    # A split of dims before the last two is one of the stack.
    first = parameter.dim() - 2
    split = [axis for axis in longer if axis not in copied and placements[axis].dim >= first]  # type: ignore[attr-defined]
    axes = sorted(copied + split)
    if not axes or (first and not split):
        return None
    parts, copies = {}, {}
    for places in product(*(range(mesh.size(axis)) for axis in axes)):
        at = list(here)
        for axis, place in zip(axes, places, strict=True):
            at[axis] = place
        size, offset = _compute_local_shape_and_global_offset(parameter.shape, mesh.shape, at, placements)
        rows, columns = (slice(start, start + length) for start, length in zip(offset[-2:], size[-2:], strict=True))
        rank = int(mesh.mesh[tuple(at)])
        parts[rank], copies[rank] = (rows, columns), tuple(at[axis] for axis in copied)
    group = mesh.get_group(axes[0]) if len(axes) == 1 else _group(tuple(sorted(parts)), made)
    ranks = dist.get_process_group_ranks(group)
    return Sharing(group, tuple(parts[rank] for rank in ranks), tuple(copies[rank] for rank in ranks))


def _group(ranks: tuple[int, ...], made: dict[tuple[int, ...], dist.ProcessGroup]) -> dist.ProcessGroup:
    if ranks not in made:
        # By its members alone: a pipeline's other stages have other parameters.
        made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]


def _size(place: tuple[slice, slice] | None) -> int:
    return 0 if place is None else prod(each.stop - each.start for each in place)


def _stacked(parameter: Tensor) -> list[slice]:
    """Rows of each of this rank's matrices."""
    part = own(parameter)
    height = part.shape[-2]
    return [slice(index * height, (index + 1) * height) for index in range(part.shape[:-2].numel())]


def _exchanged(parts: Sequence[Tensor], sizes: Sequence[int], ranks: dist.ProcessGroup, like: Tensor) -> list[Tensor]:
    """Send a part to each of the first ranks; what comes from each of the first, flat and of those sizes."""
    sent = torch.cat([like.new_empty(0), *(part.flatten() for part in parts)])
    received = like.new_empty(sum(sizes))
    send, receive = (
        [*some, *[0] * (ranks.size() - len(some))] for some in ([part.numel() for part in parts], list(sizes))
    )
    dist.all_to_all_single(received, sent, receive, send, group=ranks)
    return list(received.split(list(sizes)))
