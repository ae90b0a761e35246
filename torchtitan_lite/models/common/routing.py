"""Which experts a token goes to, and what keeps their load even; the same on every mesh.

All that is counted or averaged is so over whole samples, of which several ranks may hold parts.

Shapes: B samples, L tokens of each on this rank, S of each on all ranks, E experts, K choices of a token.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_lite.distributed.collectives import all_reduce, gather
from torchtitan_lite.distributed.plans import capacity

# What follows the E counts of a step in a mixture's `counted`: choices dropped, balance loss, z-loss.
EXTRAS = 3


@dataclass(frozen=True)
class Sharers:
    """Ranks that hold parts of the same samples, equal ones. positions_S: int64, of all their tokens, in rank order."""

    group: dist.ProcessGroup
    positions_S: Tensor

    @property
    def own_L(self) -> Tensor:
        """Positions of this rank's tokens."""
        return self.positions_S.chunk(self.group.size())[self.group.rank()]


@dataclass(frozen=True)
class Rules:
    """As the keys of [moe] and debug.moe_force_load_balance; capacity_factor None drops nothing."""

    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    capacity_factor: float | None = None
    forced: bool = False


class Routing(nn.Module):
    """From router logits to choices. No parameters. sharers: None where samples are whole."""

    def __init__(self, top_k: int, rules: Rules = Rules(), sharers: Sharers | None = None) -> None:
        super().__init__()
        self.top_k, self.rules, self.sharers = top_k, rules, sharers

    def forward(
        self, logits_BLE: Tensor, bias_E: Tensor, weights_B: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Experts int64 [B, L, K], E where the choice is dropped; weights float32 [B, L, K], of the choices of a token
        1 in sum; with weights_B the balance (see _balance).

        logits_BLE: float32. bias_E: moves choices, not weights. weights_B: of each sample in the step's mean over
        samples, 0 for one that only fills up a batch.
        """
        scores_BLE = logits_BLE.softmax(-1)
        if self.rules.forced:
            chosen_BLK = self._in_turn(scores_BLE)
        else:
            chosen_BLK = (scores_BLE.detach() + bias_E).topk(self.top_k).indices
        picked_BLK = scores_BLE.gather(-1, chosen_BLK)
        experts_BLK = chosen_BLK
        if self.rules.capacity_factor is not None:
            experts_BLK = self._within_capacity(chosen_BLK, len(bias_E), self.rules.capacity_factor)
        balance = None
        if weights_B is not None:
            balance = self._balance(logits_BLE, scores_BLE, chosen_BLK, experts_BLK, weights_B)
        return experts_BLK, picked_BLK / picked_BLK.sum(-1, keepdim=True), balance

    def _balance(
        self, logits_BLE: Tensor, scores_BLE: Tensor, chosen_BLK: Tensor, experts_BLK: Tensor, weights_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's parts of: the loss to add (float32 scalar), and what is counted (float64 [E + EXTRAS]); a loss
        that the rules give no weight is not computed, and counted as 0.

        Balance loss of a sample: E / K x the sum over experts of its share of the choices times its mean score (Fedus
        et al., arXiv:2101.03961, a sample at a time as in arXiv:2405.04434); 1 where all have as much. The share has
        no gradient: with it known whole, the loss is a sum of what each token contributes.
        """
        experts, tokens = scores_BLE.shape[-1], self._tokens(scores_BLE)
        counts_BE = _counts(chosen_BLK, experts)
        aux = z = logits_BLE.new_zeros(())
        if self.rules.aux_loss_coeff:
            whole_BE = counts_BE if self.sharers is None else all_reduce(counts_BE, "sum", self.sharers.group)
            share_BE = whole_BE * (experts / (self.top_k * tokens))
            aux = (weights_B * (share_BE * scores_BLE.sum(1)).sum(-1)).sum() / tokens
        if self.rules.z_loss_coeff:
            z = (weights_B * logits_BLE.logsumexp(-1).square().sum(-1)).sum() / tokens
        real_B = (weights_B > 0).to(torch.float64)
        dropped_B = (experts_BLK == experts).sum((1, 2)).to(torch.float64)
        # No matrix products: selective checkpointing would keep the result, which torch squeezes in place.
        counts_E, dropped = (real_B[:, None] * counts_BE).sum(0), (real_B * dropped_B).sum()
        counted = torch.cat((counts_E, torch.stack((dropped, aux.detach(), z.detach()))))
        return self.rules.aux_loss_coeff * aux + self.rules.z_loss_coeff * z, counted

    def _in_turn(self, scores_BLE: Tensor) -> Tensor:
        batch, length, experts = scores_BLE.shape
        positions_L = torch.arange(length, device=scores_BLE.device)
        if self.sharers is not None:
            positions_L = self.sharers.own_L
        every = torch.arange(self.top_k, device=scores_BLE.device)
        return ((positions_L[:, None] * self.top_k + every) % experts).expand(batch, -1, -1)

    def _within_capacity(self, chosen_BLK: Tensor, experts: int, factor: float) -> Tensor:
        """The choices, those dropped that find an expert full; earlier tokens first, so that no token depends on one
        behind it."""
        limit = capacity(factor, self._tokens(chosen_BLK), self.top_k, experts)
        if self.sharers is None:
            return chosen_BLK.where(_places(chosen_BLK, experts) < limit, experts)
        whole_BSK = gather(chosen_BLK, self.sharers.group).movedim(0, 1).flatten(1, 2)
        by_position = torch.empty_like(whole_BSK)
        by_position[:, self.sharers.positions_S] = whole_BSK
        return chosen_BLK.where(_places(by_position, experts)[:, self.sharers.own_L] < limit, experts)

    def _tokens(self, x: Tensor) -> int:
        """Of a whole sample."""
        return x.shape[1] * (1 if self.sharers is None else self.sharers.group.size())


def _counts(chosen_BLK: Tensor, experts: int) -> Tensor:
    """int64 [B, E]: choices of each expert in each sample."""
    batch = chosen_BLK.shape[0]
    rows = torch.arange(batch, device=chosen_BLK.device)[:, None, None] * experts + chosen_BLK
    counts = rows.new_zeros(batch * experts).index_add_(0, rows.flatten(), torch.ones_like(rows).flatten())
    return counts.view(batch, experts)


def _places(chosen_BSK: Tensor, experts: int) -> Tensor:
    """int64 [B, S, K]: how many choices before it, in its sample, are of the same expert."""
    flat = chosen_BSK.flatten(1)
    ordered, order = flat.sort(dim=1, stable=True)
    counts_BE = _counts(chosen_BSK, experts)
    starts = (counts_BE.cumsum(1) - counts_BE).gather(1, ordered)
    places = torch.arange(flat.shape[1], device=flat.device) - starts
    return torch.empty_like(flat).scatter_(1, order, places).view_as(chosen_BSK)
