"""Gather and exchange against arithmetic by hand, whatever the memory layout of values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import RankPool

SHAPE = (2, 3, 4)  # of one rank's part; no two dims alike, so that a permuted gradient shows


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in memory of another order: as attention returns them, or one value for all."""
    if layout == "expanded":
        return x.flatten()[0].expand(x.shape)
    if layout == "permuted":
        last_first = (x.dim() - 1, *range(x.dim() - 1))
        moved = x.permute(last_first).contiguous()
        return moved.permute(*range(1, x.dim()), 0)
    return x


def _operation(name: str) -> Callable[..., Tensor]:
    from torchtitan_lite.distributed import collectives

    operation: Callable[..., Tensor] = getattr(collectives, name)
    return operation


def _run(name: str, layout: str) -> tuple[Tensor, Tensor]:
    """What a rank gets, and the gradient of what it gave; gradients arrive in `layout`, and so do values."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = _laid_out(_numbers(rank, *_given(name, ranks)), layout).detach().requires_grad_()
    found = _operation(name)(x, dist.group.WORLD)
    found.backward(_laid_out(_numbers(100 + rank, *found.shape), layout))
    assert x.grad is not None
    return found.detach(), x.grad


def _given(name: str, ranks: int) -> tuple[int, ...]:
    return SHAPE if name == "gather" else (ranks, *SHAPE)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "expanded"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_stacks_and_its_gradient_is_summed_and_scattered(pool: RankPool, ranks: int, layout: str) -> None:
    every = torch.stack([_laid_out(_numbers(rank, *SHAPE), layout) for rank in range(ranks)])
    grads = sum(_laid_out(_numbers(100 + rank, ranks, *SHAPE), layout) for rank in range(ranks))
    for rank, (found, grad) in enumerate(pool.run(_run, ranks, "gather", layout)):
        assert torch.equal(found, every)
        assert torch.allclose(grad, grads[rank], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "expanded"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_exchange_swaps_parts_and_its_gradient_goes_back(pool: RankPool, ranks: int, layout: str) -> None:
    given = [_laid_out(_numbers(rank, ranks, *SHAPE), layout) for rank in range(ranks)]
    grads = [_laid_out(_numbers(100 + rank, ranks, *SHAPE), layout) for rank in range(ranks)]
    for rank, (found, grad) in enumerate(pool.run(_run, ranks, "exchange", layout)):
        assert torch.equal(found, torch.stack([given[other][rank] for other in range(ranks)]))
        assert torch.equal(grad, torch.stack([grads[other][rank] for other in range(ranks)]))


def _reduced() -> tuple[Tensor, Tensor]:
    x = _laid_out(_numbers(dist.get_rank(), *SHAPE), "permuted")
    reduce = _operation("all_reduce")
    return reduce(x, "sum", dist.group.WORLD), reduce(x, "max", dist.group.WORLD)


def test_reductions_are_over_all_ranks(pool: RankPool) -> None:
    every = torch.stack([_numbers(rank, *SHAPE) for rank in range(3)])
    for total, largest in pool.run(_reduced, 3):
        assert torch.allclose(total, every.sum(dim=0), atol=1e-6)
        assert torch.equal(largest, every.amax(dim=0))
