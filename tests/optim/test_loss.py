"""Cross-entropy of logits that are split over the vocabulary: the value and gradient of the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import RankPool
from torchtitan_lite.optim.loss import IGNORE, token_loss_sum

BATCH, SEQ, VOCABULARY = 2, 5, 24


def _logits(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(BATCH, SEQ, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, SEQ), generator=generator)
    labels[0, 1:3] = IGNORE
    labels[1, 0], labels[1, 1] = 0, VOCABULARY - 1
    return logits, labels


def _sharded(scale: float, upstream: float) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss and the gradient of all logits."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    logits, labels = _logits(scale)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(logits, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
    loss = token_loss_sum(spread, labels)
    (loss * upstream).backward()
    assert spread.grad is not None
    return loss.detach(), spread.grad.full_tensor()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("scale", "upstream"), [(1.0, 1.0), (3.0, 0.25), (1e4, 1.0)])
def test_the_sharded_loss_is_that_of_the_whole(pool: RankPool, ranks: int, scale: float, upstream: float) -> None:
    logits, labels = _logits(scale)
    logits.requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected * upstream).backward()
    for loss, grad in pool.run(_sharded, ranks, scale, upstream):
        assert torch.isfinite(loss)
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert torch.allclose(grad, logits.grad, atol=1e-6)
        assert torch.equal(grad[0, 1:3], torch.zeros(2, VOCABULARY))


def test_no_label_is_no_loss(pool: RankPool) -> None:
    logits = torch.randn(1, 3, 8, requires_grad=True)
    loss = token_loss_sum(logits, torch.full((1, 3), IGNORE))
    loss.backward()
    assert loss == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
