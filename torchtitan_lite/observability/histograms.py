"""Histograms of whole tensors, counted where their shards are."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

# A float32's sign, exponent and first three bits after the point are its bucket: eight to each doubling, and no search.
_BITS, _EACH = 20, 8
_BIAS, _NO_NUMBER = 127, 255  # exponents as they are stored
# The smallest and largest powers of two with buckets of their own. What is closer to zero is in one around it.
_SMALLEST, _LARGEST = -40, 24
_CHUNK = 1 << 24  # elements at a time, so that a large embedding takes no memory of its own size

Histogram = tuple[list[float], list[float]]  # the edges of n buckets, n + 1 of them, ascending; n counts


def _edges() -> Tensor:
    """Of all buckets but the first column of a table, float64, ascending; the outermost hold all that is beyond."""
    parts = 1 + torch.arange(_EACH, dtype=torch.float64) / _EACH
    powers = 2.0 ** torch.arange(_SMALLEST, _LARGEST, dtype=torch.float64)
    ends = 2.0 ** torch.tensor([_LARGEST, _LARGEST + 1], dtype=torch.float64)
    positive = torch.cat([torch.outer(powers, parts).flatten(), ends])
    return torch.cat([-positive.flip(0), positive])


@dataclass(frozen=True)
class Counted:
    """names and sizes: of parameters. table: float64 [2, parameters, 1 + buckets], the sum over all ranks, of
    parameters and of gradients; first column: what is infinite or no number."""

    names: list[str]
    sizes: list[int]
    table: Tensor

    def on_host(self) -> "Counted":
        return replace(self, table=self.table.cpu())

    def read(self) -> tuple[dict[str, Histogram], dict[str, int]]:
        """Of each tag its histogram, from the first to the last bucket that holds something, with empty ones between
        them in one; and of those tags that have some, how many elements are in no bucket: infinite, or no number.

        Parameters without a gradient have no histogram of one.
        """
        edges = _edges()
        found: dict[str, Histogram] = {}
        lost: dict[str, int] = {}
        for kind, rows in zip(("", " (gradient)"), self.table, strict=True):
            for name, size, row in zip(self.names, self.sizes, rows, strict=True):
                tag, counts = tag_of(name) + kind, _one_copy(name, size, row)
                lost_here, counts = int(counts[0]), counts[1:]
                # Where a bucket or the one before it holds something: the rest of an empty stretch goes into its first.
                starts = (counts > 0) | (functional.pad(counts, (1, 0))[:-1] > 0)
                filled = counts.nonzero().flatten()
                if len(filled):
                    ends = filled[-1:] + 1
                    starts[: filled[0]] = starts[ends:] = False
                    found[tag] = (torch.cat([edges[:-1][starts], edges[ends]]).tolist(), counts[starts].tolist())
                if lost_here:
                    lost[tag] = lost_here
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

    @torch.no_grad()
    def count(self) -> Counted:
        """Each rank counts its shards, and one sum over all ranks adds them up. No host sync but of counting."""
        table = torch.zeros((2, len(self._names), len(_edges())), dtype=torch.float64, device=self._device)
        for name, parameter in self._own.items():
            for kind, tensor in enumerate((parameter, parameter.grad)):
                if tensor is not None:
                    table[kind, self._rows[name]] = _counts(_local(tensor)).to(self._device)
        dist.all_reduce(table)
        return Counted(self._names, self._sizes, table)


def _counts(local: Tensor) -> Tensor:
    """A row of a table."""
    counts = torch.zeros(1 << (32 - _BITS), dtype=torch.int64, device=local.device)
    for chunk in local.reshape(-1).split(_CHUNK):
        places = (chunk.float().view(torch.int32) >> _BITS) & (len(counts) - 1)
        counts += places.bincount(minlength=len(counts))
    signs = counts.view(2, -1)  # positive and negative, each by size
    first, last, end = (_EACH * exponent for exponent in (_SMALLEST + _BIAS, _LARGEST + _BIAS, _NO_NUMBER))
    small, buckets, large = signs[:, :first].sum(), signs[:, first:last], signs[:, last:end].sum(1, keepdim=True)
    return torch.cat([signs[:, end:].sum().view(1), large[1], buckets[1].flip(0), small.view(1), buckets[0], large[0]])


def _of_stages(sizes: dict[str, int], stages: dist.ProcessGroup | None) -> dict[str, int]:
    """Those of all stages, in the same order on every rank."""
    if stages is None:
        return sizes
    gathered: list[dict[str, int]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(gathered, sizes, group=stages)
    return {name: size for each in gathered for name, size in each.items()}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


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
