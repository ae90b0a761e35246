"""Histograms of whole tensors, counted where their shards are."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# The buckets of each sign: four to each doubling. What is smaller than all falls into one around zero.
_SMALLEST, _LARGEST, _EACH = -40, 24, 4
_CHUNK = 1 << 24  # elements at a time, so that a large embedding takes no memory of its own size

Histogram = tuple[list[float], list[float]]  # the edges of n buckets, n + 1 of them, ascending; n counts


def _positive() -> Tensor:
    steps = torch.arange(_SMALLEST * _EACH, _LARGEST * _EACH + 1, dtype=torch.float64)
    return (2.0 ** (steps / _EACH)).float()


def _edges() -> Tensor:
    """float32, ascending. What falls outside of them is no finite number."""
    largest, positive = torch.finfo(torch.float32).max, _positive()
    return torch.cat([torch.tensor([-largest]), -positive.flip(0), positive, torch.tensor([float("inf")])])


@dataclass(frozen=True)
class Counted:
    """names and sizes: of parameters. table: float64 [2, parameters, buckets + 2], the sum over all ranks, of
    parameters and of gradients; first and last column: what is no finite number."""

    names: list[str]
    sizes: list[int]
    table: Tensor

    def on_host(self) -> "Counted":
        return replace(self, table=self.table.cpu())

    def read(self) -> tuple[dict[str, Histogram], dict[str, int]]:
        """Of each tag its histogram, from the first to the last bucket that holds something; and of those tags that
        have some, how many elements are in no bucket: infinite, or no number.

        Parameters without a gradient have no histogram of one.
        """
        edges = _edges().double()
        edges[0], edges[-1] = 2 * edges[1], 2 * edges[-2]  # of what lies beyond, for a picture's sake
        found: dict[str, Histogram] = {}
        lost: dict[str, int] = {}
        for kind, rows in zip(("", " (gradient)"), self.table, strict=True):
            for name, size, row in zip(self.names, self.sizes, rows, strict=True):
                tag, counts = tag_of(name) + kind, _one_copy(name, size, row)
                filled = counts[1:-1].nonzero().flatten().tolist()
                if filled:
                    first, last = filled[0], filled[-1]
                    found[tag] = (edges[first : last + 2].tolist(), counts[1:-1][first : last + 1].tolist())
                if outside := int(counts[0] + counts[-1]):
                    lost[tag] = outside
        return found, lost


class Histograms:
    """Counts a model's parameters and gradients. Collective, as is `count`.

    parameters: this rank's, by name. stages: ranks that hold other parameters of the model; None where all hold parts
    of the same. device: what ranks reduce on.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], stages: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._own, self._device = dict(parameters), device
        sizes = _of_stages({name: parameter.numel() for name, parameter in self._own.items()}, stages)
        self._names, self._sizes = list(sizes), list(sizes.values())
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._edges = _edges()

    @torch.no_grad()
    def count(self) -> Counted:
        """Each rank counts its shards, and one sum over all ranks adds them up. No host sync but of counting."""
        width = len(self._edges) + 1
        table = torch.zeros((2, len(self._names), width), dtype=torch.float64, device=self._device)
        for name, parameter in self._own.items():
            for kind, tensor in enumerate((parameter, parameter.grad)):
                if tensor is not None:
                    table[kind, self._rows[name]] = self._counts(_local(tensor)).to(self._device)
        dist.all_reduce(table)
        return Counted(self._names, self._sizes, table)

    def _counts(self, local: Tensor) -> Tensor:
        edges = self._edges.to(local.device)
        counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=local.device)
        for chunk in local.reshape(-1).split(_CHUNK):
            # Infinities and what is no number fall before the first edge or behind the last.
            places = torch.bucketize(chunk.float(), edges, out_int32=True, right=True)
            counts += places.bincount(minlength=len(counts))
        return counts


def settle(device: torch.device) -> None:
    """Wait for the device, where what it has yet to do is to count as a step's time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_stages(sizes: dict[str, int], stages: dist.ProcessGroup | None) -> dict[str, int]:
    """Those of all stages, in the same order on every rank."""
    if stages is None:
        return sizes
    gathered: list[dict[str, int]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(gathered, sizes, group=stages)
    return {name: size for each in gathered for name, size in each.items()}


def _local(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # torchao wraps what FSDP is to gather in float8.
    return getattr(local, "_tensor", local).detach()


def _one_copy(name: str, size: int, row: Tensor) -> Tensor:
    """Counts of a tensor of that size, from those of all its copies: meshes differ in which axes hold copies, but each
    element has as many as the others."""
    copies, rest = divmod(int(row.sum()), size)
    assert not rest, f"{name}: {int(row.sum())} elements counted on all ranks, of {size}"
    return row / max(copies, 1)


def tag_of(name: str) -> str:
    """`layers.0/attention.wq.weight`: TensorBoard puts what stands before the slash into one group."""
    parts = name.split(".")
    first = 2 if len(parts) > 2 and parts[1].isdecimal() else 1
    return "/".join(filter(None, (".".join(parts[:first]), ".".join(parts[first:]))))
