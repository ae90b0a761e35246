"""A mixture of experts in the place of a block's feed-forward (Shazeer et al., arXiv:1701.06538).

Shapes: B batch, L sequence, D dim, N = B x L tokens of this rank, E experts, K choices of a token, F width of an
expert, R rows: choices sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.distributed.expert_parallel import Beside, Local, local
from torchtitan_lite.distributed.units import matches
from torchtitan_lite.models.common.layers import FeedForward
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.common.routing import EXTRAS, Routing, Rules, Sharers


class Router(nn.Module):
    """Scores before the softmax, in float32 whatever the parameters are: rounding would move choices."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.linear(x_BLD.float(), local(self.weight).float())


class GroupedSwiGLU(nn.Module):
    """Each expert's SwiGLU of its rows; those past the last end hold anything, and may get anything.

    Another way to multiply (see quantization.grouped) is another module in its place.
    """

    def forward(self, rows_RD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, w3_EDF: Tensor, ends_E: Tensor) -> Tensor:
        """[R, D]. ends_E: int32, where each expert's rows end. The matrices are views of transposed ones."""
        gate_RF = self.product(rows_RD, w1_EDF, ends_E)
        hidden_RF = F.silu(gate_RF) * self.product(rows_RD, w3_EDF, ends_E)
        return self.product(hidden_RF, w2_EFD, ends_E)

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Rows [R, in] times their expert's matrix of [E, in, out]."""
        return F.grouped_mm(rows, weights, offs=ends)


class Experts(nn.Module):
    """SwiGLU feed-forwards side by side; expert e is w1[e], w2[e], w3[e]. The dispatch brings tokens to them."""

    def __init__(self, num_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.dispatch = Local(num_experts)
        self.swiglu = GroupedSwiGLU()

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, beside: Beside, *, drops: bool) -> Tensor:
        """As dispatch: the weighed sums [N, 1, D]. drops: whether choices may be dropped."""
        w1_EDF, w2_EFD, w3_EDF = (local(w).transpose(-2, -1) for w in (self.w1, self.w2, self.w3))

        def compute(rows_RD: Tensor, ends_E: Tensor) -> Tensor:
            if not drops:  # all rows are some expert's
                return self.swiglu(rows_RD, w1_EDF, w2_EFD, w3_EDF, ends_E)  # type: ignore[no-any-return]
            # torch leaves what a grouped product makes of rows past the last end as the memory was, in the output and
            # in the gradient of the rows: one selection cuts the first, the other the second.
            own_R1 = torch.arange(len(rows_RD), device=ends_E.device)[:, None] < ends_E[-1]
            rows_RD = rows_RD.where(own_R1, 0.0)
            return self.swiglu(rows_RD, w1_EDF, w2_EFD, w3_EDF, ends_E).where(own_R1, 0.0)  # type: ignore[no-any-return]

        return self.dispatch(x_ND, experts_NK, weights_NK, compute, beside)  # type: ignore[no-any-return]


class MoE(nn.Module):
    """Each token's top_k experts, weighed by their scores, and the shared ones.

    expert_bias: float32 [E], moves choices (see balance). counted: float64 [E + EXTRAS], of the step so far.
    """

    def __init__(self, dim: int, ffn_dim: int, shape: MoEShape) -> None:
        super().__init__()
        self.router = Router(dim, shape.num_experts)
        self.routing = Routing(shape.top_k)
        self.experts = Experts(shape.num_experts, dim, ffn_dim)
        # As wide as all of them side by side, which is the sum of them.
        shared = shape.num_shared_experts
        self.shared = FeedForward(dim, shared * ffn_dim) if shared else None
        self.register_buffer("expert_bias", torch.zeros(shape.num_experts))
        self.register_buffer("counted", torch.zeros(shape.num_experts + EXTRAS, dtype=torch.float64), persistent=False)
        self.expert_bias: Tensor
        self.counted: Tensor

    def forward(self, x_BLD: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """[B, L, D]. weights_B: as in Routing; with it the balance losses join the backward, and choices count."""
        experts_BLK, weights_BLK, balance = self.routing(self.router(x_BLD), self.expert_bias, weights_B)
        x_ND, experts_NK, weights_NK = (each.flatten(0, 1) for each in (x_BLD, experts_BLK, weights_BLK))
        # Kept here: FSDP, whose unit the experts are, warns of results that are views, as of a collective's.
        shared: list[Tensor] = []

        def beside() -> None:
            if self.shared is not None:
                shared.append(self.shared(x_BLD))

        drops = self.routing.rules.capacity_factor is not None
        out_BLD = self.experts(x_ND, experts_NK, weights_NK, beside, drops=drops).view_as(x_BLD)
        for each_BLD in shared:
            out_BLD = out_BLD + each_BLD
        return out_BLD if balance is None else _Balanced.apply(out_BLD, *balance, self.counted)  # type: ignore[no-any-return]


def apply_routing(model: nn.Module, moe: str, rules: Rules, sharers: Sharers | None) -> None:
    """Route by `rules` in every mixture that the pattern `moe` names, in place."""
    for name, module in list(model.named_modules()):
        if matches(name, moe):
            module.set_submodule("routing", Routing(module.get_submodule("routing").top_k, rules, sharers))


class _Balanced(torch.autograd.Function):
    """Adds `loss` to what is differentiated, from where it arises: no output has to carry it through the stages of a
    pipeline. Counts in the backward, which runs once for each micro-batch, however often its forward is run."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, counted: Tensor, into: Tensor) -> Tensor:
        ctx.save_for_backward(counted)
        ctx.into = into
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (counted,) = ctx.saved_tensors
        ctx.into.add_(counted)
        return grad, torch.ones((), device=grad.device), None, None
