"""Cross-entropy as a sum: what divides it is the step's business (see assembly)."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a position without loss


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid tokens of the cross-entropy in nats: float32 scalar.

    logits [batch, seq, vocab], labels int64 [batch, seq] with IGNORE where there is no loss.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
