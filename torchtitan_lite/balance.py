"""The load of experts over a step: counted over all ranks, evened by a bias, summed up for the log."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_lite.config.schema import MoE as MoESection
from torchtitan_lite.models.common.moe import MoE
from torchtitan_lite.models.common.routing import EXTRAS


class Balance:
    """The mixtures of a rank's `parts`, among `names`, those of the whole model in order.

    num_experts: of each. rate: moe.bias_update_rate.
    """

    def __init__(
        self, parts: Iterable[nn.Module], names: Sequence[str], num_experts: int, rate: float, device: torch.device
    ) -> None:
        modules = {name: module for part in parts for name, module in part.named_modules() if isinstance(module, MoE)}
        self._own = {row: modules[name] for row, name in enumerate(names) if name in modules}
        self._rate, self._experts = rate, num_experts
        self._none = torch.zeros((len(names), num_experts + EXTRAS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> Tensor:
        """After a step's backward: move each expert's bias by `rate` towards an even share, and start counting anew.

        skip: scalar on the device; where it is not 0, biases stay where they are.

        Returns what was counted: float64 [layers, E + EXTRAS], the same on every rank (see routing.EXTRAS). Counts are
        whole numbers, so the biases are the same to the bit on every mesh. Collective, no host sync.
        """
        counted = self._none.clone()
        for row, moe in self._own.items():
            counted[row] = moe.counted
            moe.counted.zero_()
        # Rows of other pipeline stages come from their ranks.
        dist.all_reduce(counted)
        counts = counted[:, : self._experts]
        moves = self._rate * (counts.mean(1, keepdim=True) - counts).sign()
        # Centred, as only differences choose: biases do not drift.
        moves -= moves.mean(1, keepdim=True)
        if skip is not None:
            moves = moves.where(skip == 0, 0.0)
        for row, moe in self._own.items():
            moe.expert_bias += moves[row]
        return counted


def routing_record(counted: Tensor, section: MoESection) -> dict[str, Any]:
    """What is logged of Balance.step's result: means over layers of the two losses, unweighted, None where [moe] gives
    one no weight; the lowest entropy of a layer's shares (1: even) and the largest share; choices dropped; choices of
    each expert, a list for each layer."""
    counts, (dropped, aux, z) = counted[:, :-EXTRAS], counted[:, -EXTRAS:].unbind(1)
    shares = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1) / torch.tensor(float(counts.shape[1])).log()
    return {
        "moe_aux_loss": aux.mean().item() if section.aux_loss_coeff else None,
        "moe_z_loss": z.mean().item() if section.z_loss_coeff else None,
        "moe_entropy": entropy.min().item(),
        "moe_largest_share": shares.max().item(),
        "moe_dropped": int(dropped.sum()),
        "moe_tokens_per_expert": [[int(count) for count in row] for row in counts.tolist()],
    }
