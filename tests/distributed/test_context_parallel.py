"""Shares of a sequence, document masks, and the collectives under context parallelism."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool
from torchtitan_lite.distributed.context_parallel import SequenceShare, document_mask


@pytest.mark.parametrize("method", ["allgather", "alltoall"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_the_whole_sequence_in_equal_parts(method: str, ranks: int) -> None:
    shares = [SequenceShare(method, rank, ranks).positions(48) for rank in range(ranks)]
    assert {len(share) for share in shares} == {48 // ranks}
    assert sorted(torch.cat(shares).tolist()) == list(range(48))
    # Causal attention from a position costs as much as there are positions up to it.
    costs = {int((share + 1).sum()) for share in shares}
    assert len(costs) == 1 or method == "alltoall"


def test_one_rank_has_a_sequence_of_any_length() -> None:
    for method in ("allgather", "alltoall"):
        for seq_len in (1, 2, 33):
            assert SequenceShare(method, 0, 1).positions(seq_len).tolist() == list(range(seq_len))


def test_queries_are_a_ranks_own_or_all() -> None:
    assert SequenceShare("allgather", 1, 2).query_positions(8).tolist() == [2, 3, 4, 5]
    assert SequenceShare("alltoall", 1, 2).positions(8).tolist() == [4, 5, 6, 7]
    assert SequenceShare("alltoall", 1, 2).query_positions(8).tolist() == list(range(8))


def test_a_document_mask_is_causal_within_documents() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 2, 2]])
    queries = torch.tensor([4, 0, 5])
    mask = document_mask(documents, queries)
    assert mask.shape == (2, 1, 3, 6)
    for sample in range(2):
        for row, query in enumerate(queries.tolist()):
            for key in range(6):
                sees = key <= query and documents[sample, key] == documents[sample, query]
                assert mask[sample, 0, row, key] == sees


def _collected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What gather and exchange give a rank, and the gradients for what it put in."""
    from torchtitan_lite.distributed.collectives import exchange, gather

    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = (torch.arange(6.0).view(2, 3) + 100 * rank).requires_grad_()
    gathered = gather(x, dist.group.WORLD)
    (gathered * (rank + 1)).sum().backward()
    parts = (torch.arange(float(ranks)).view(ranks, 1) + 10 * rank).requires_grad_()
    exchanged = exchange(parts, dist.group.WORLD)
    (exchanged * torch.tensor([[rank + 1.0]])).sum().backward()
    assert x.grad is not None
    assert parts.grad is not None
    return gathered.detach(), x.grad, exchanged.detach(), parts.grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_and_their_gradients_by_hand(pool: RankPool, ranks: int) -> None:
    for rank, (gathered, grad, exchanged, parts_grad) in enumerate(pool.run(_collected, ranks)):
        assert torch.equal(gathered, torch.stack([torch.arange(6.0).view(2, 3) + 100 * r for r in range(ranks)]))
        # Every rank weighs what it gathered by its number: their sum comes back.
        assert torch.equal(grad, torch.full((2, 3), float(sum(range(1, ranks + 1)))))
        assert exchanged.flatten().tolist() == [rank + 10 * r for r in range(ranks)]
        assert parts_grad.flatten().tolist() == [r + 1.0 for r in range(ranks)]


def test_copied_key_heads_serve_the_queries_of_their_group(pool: RankPool) -> None:
    for found, expected in pool.run(_ulysses, 4):
        assert torch.allclose(found, expected, atol=1e-6)


def _ulysses() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the sequence by heads exchanged over 4 ranks with 2 key heads, and by plain attention."""
    from torchtitan_lite.distributed.context_parallel import _Exchanged
    from torchtitan_lite.models.common.layers import DotProductAttention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 16, 8, 4, generator=generator)
    k, v = (torch.randn(2, 16, 2, 4, generator=generator) for _ in range(2))
    core, rows = DotProductAttention(), SequenceShare("alltoall", dist.get_rank(), 4).positions(16)
    shared = _Exchanged(core, dist.group.WORLD)
    return shared(q[:, rows], k[:, rows], v[:, rows], None), core(q, k, v, None)[:, rows]
