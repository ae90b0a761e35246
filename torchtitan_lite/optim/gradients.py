"""The global gradient norm and clipping, the same on every mesh."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

_PIECE = 1 << 16  # values: half a MiB in float64


def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float, stages: dist.ProcessGroup | None) -> Tensor:
    """Scale gradients in place to a global L2 norm of at most `max_norm`; return the norm before: float64 scalar.

    stages: ranks that hold other parameters of the model (pipeline stages); None where all hold parts of the same.
    Squared sums accumulate in float64 over all shards, each counted once: a float32 norm moves by 3e-5
    between meshes, and clipping feeds that back into the run. No host sync.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    groups: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for grad in grads:
        groups[_sharded_over(grad)].append(_local(grad))
    squares = [_sum_over_shards(_squared_sum(local), key) for key, local in groups.items()]
    total = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(total, group=stages)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)
    torch._foreach_mul_([_local(grad) for grad in grads], scale)
    return norm


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _sharded_over(grad: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh and those of its axes over which a gradient is split; None for a plain tensor."""
    if not isinstance(grad, DTensor):
        return None
    # Not is_shard(): it is False for the strided shards that FSDP makes of tensor-parallel ones.
    return grad.device_mesh, tuple(
        axis for axis, placement in enumerate(grad.placements) if not placement.is_replicate()
    )


def _squared_sum(local: list[Tensor]) -> Tensor:
    if local[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    # There it writes each gradient out in float64 first; a piece of one stays in the cache.
    wide, squares = local[0].new_empty(_PIECE, dtype=torch.float64), []
    for piece in (piece for each in local for piece in each.flatten().split(_PIECE)):
        into = wide[: piece.numel()].copy_(piece)
        squares.append(torch.dot(into, into))
    return torch.stack(squares).sum()


def _sum_over_shards(squares: Tensor, key: tuple[DeviceMesh, tuple[int, ...]] | None) -> Tensor:
    if key is not None:
        mesh, axes = key
        for axis in axes:
            dist.all_reduce(squares, group=mesh.get_group(axis))
    return squares
