"""Context parallelism: ranks share each sequence, and attention brings its parts together.

`allgather`: a rank gathers all keys and values (as in Llama 3's training, arXiv:2407.21783) and attends from its own
queries. `alltoall`: ranks exchange parts of the sequence for parts of the heads (Ulysses, arXiv:2309.14509).

Shapes: B batch, L a rank's part of the sequence, S the whole of it, H query heads, K key/value heads, E head size.
"""

from dataclasses import dataclass
from math import lcm

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from torchtitan_lite.distributed.collectives import exchange, gather
from torchtitan_lite.distributed.plans import ContextPlan
from torchtitan_lite.distributed.units import matches


@dataclass(frozen=True)
class SequenceShare:
    """Which positions of a sequence are a rank's. method: parallelism.context_parallel_rotate_method."""

    method: str
    rank: int
    ranks: int

    def positions(self, seq_len: int) -> Tensor:
        """int64 [seq_len / ranks]. All-gather cuts a sequence into two pieces a rank and gives rank r the pieces r
        and 2n - 1 - r: causal attention then costs as much on each."""
        whole = torch.arange(seq_len)
        if self.method == "alltoall" or self.ranks == 1:
            return whole.chunk(self.ranks)[self.rank]
        pieces = whole.chunk(2 * self.ranks)
        return torch.cat((pieces[self.rank], pieces[2 * self.ranks - 1 - self.rank]))

    def query_positions(self, seq_len: int) -> Tensor:
        """Positions of the queries that this rank attends from: all where heads are what it has parts of."""
        return torch.arange(seq_len) if self.method == "alltoall" else self.positions(seq_len)


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh, plan: ContextPlan, method: str, seq_len: int) -> None:
    """Wrap every attention that `plan` names, in place; `mesh` has the one axis of ranks that share a sequence.

    method: parallelism.context_parallel_rotate_method. seq_len: of the whole sequence.
    """
    group = mesh.get_group()
    for name, module in list(model.named_modules()):
        if matches(name, plan.attention):
            wrapped = _Exchanged(module, group) if method == "alltoall" else _Gathered(module, group, seq_len)
            model.set_submodule(name, wrapped)


def document_mask(documents_BS: Tensor, queries_L: Tensor) -> Tensor:
    """bool [B, 1, L, S]: whether the query at a position sees a key, causally and within its document.

    documents_BS: a number for the document of each token, whole sequences. queries_L: positions of the queries.
    """
    causal_LS = queries_L[:, None] >= torch.arange(documents_BS.shape[1], device=documents_BS.device)
    same_BLS = documents_BS[:, queries_L, None] == documents_BS[:, None, :]
    return (same_BLS & causal_LS)[:, None]


class _Gathered(nn.Module):
    """Attention over gathered keys and values, from the two pieces of the sequence that are this rank's."""

    def __init__(self, core: nn.Module, group: dist.ProcessGroup, seq_len: int) -> None:
        super().__init__()
        rank, ranks = group.rank(), group.size()
        self.core, self.group, self.piece = core, group, seq_len // (2 * ranks)
        # A piece needs no key behind its own end: this is what evens out the cost.
        self.ends = [(index + 1) * self.piece for index in (rank, 2 * ranks - 1 - rank)]
        # Made here: it cannot be under the modes that selective checkpointing and counters run in.
        self.biases = [causal_lower_right(self.piece, end) for end in self.ends]

    def forward(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, mask: Tensor | None) -> Tensor:
        # One collective for keys and values. The ranks' first pieces are in order, their second ones in reverse.
        parts_N2BLKE = gather(torch.stack((k_BLKE, v_BLKE)), self.group)
        first, second = parts_N2BLKE.split(self.piece, dim=3)
        k_BSKE, v_BSKE = torch.cat((*first.unbind(0), *second.flip(0).unbind(0)), dim=2).unbind(0)
        out = []
        for start, end, bias in zip((0, self.piece), self.ends, self.biases, strict=True):
            rows = slice(start, start + self.piece)
            part = bias if mask is None else mask[:, :, rows, :end]
            out.append(self.core(q_BLHE[:, rows], k_BSKE[:, :end], v_BSKE[:, :end], part))
        return torch.cat(out, dim=1)


class _Exchanged(nn.Module):
    """Attention over the whole sequence with this rank's part of the heads."""

    def __init__(self, core: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core, self.group = core, group

    def forward(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, mask: Tensor | None) -> Tensor:
        ranks, batch = self.group.size(), q_BLHE.shape[0]
        # Fewer key heads than ranks: each is copied to all the ranks whose queries it serves.
        copies = lcm(k_BLKE.shape[2], ranks) // k_BLKE.shape[2]
        heads = [q_BLHE, k_BLKE.repeat_interleave(copies, dim=2), v_BLKE.repeat_interleave(copies, dim=2)]
        # One collective for all three: [to rank, B, L, its heads, E] becomes [from rank, B, L, own heads, E].
        split = torch.cat([part.unflatten(2, (ranks, -1)) for part in heads], dim=3)
        swapped = exchange(split.movedim(2, 0), self.group)
        sizes = [part.shape[2] // ranks for part in heads]
        q, k, v = swapped.movedim(0, 1).flatten(1, 2).split(sizes, dim=2)
        out_BSHE = self.core(q, k, v, mask)
        # And back: each rank's part of the sequence for its heads.
        back = exchange(out_BSHE.unflatten(1, (ranks, -1)).movedim(1, 0), self.group)
        return back.movedim(0, 2).reshape(batch, -1, q_BLHE.shape[2], q_BLHE.shape[3])
