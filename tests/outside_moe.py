"""A mixture of experts from outside the package: the example GPT with one in the place of its feed-forward.

Its plan names no unit that has the experts in it, and no tensor style for what is the mixture's own.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from docs.examples import minimal_gpt
from docs.examples.minimal_gpt import GPTArgs
from torchtitan_lite.distributed.plans import ExpertPlan, ParallelPlan, TensorPlan
from torchtitan_lite.models.common.moe import MoE
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.spec import Init

SHAPE, WIDTH = MoEShape(8, 2, num_shared_experts=1), 48


@dataclass(frozen=True)
class Args(GPTArgs):
    def active_parameter_count(self) -> int:
        return self.parameter_count()  # for the log alone


class Block(minimal_gpt.Block):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.mlp = MoE(args.dim, WIDTH, SHAPE)

    def forward(self, x: Tensor, mask: Tensor | None, **routing: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x), **routing)


class GPT(minimal_gpt.GPT):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.blocks = nn.ModuleDict({str(index): Block(args) for index in range(args.n_layers)})

    def forward(
        self, x: Tensor, positions_L: Tensor | None = None, mask: Tensor | None = None, **routing: Tensor
    ) -> Tensor:
        if self.tokens is not None:
            x = self.tokens(x)
        if self.positions is not None:
            assert positions_L is not None
            x = x + self.positions(positions_L[None])
        for block in self.blocks.values():
            x = block(x, mask, **routing)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.output is None else self.output(x)


def initial(name: str, args: Args) -> Init:
    return Init(std=0.02) if ".mlp." in name else minimal_gpt.initial(name, args)


def plan(args: Args) -> ParallelPlan:
    dense = minimal_gpt.plan(args)
    assert dense.tensor is not None
    styles = {name: style for name, style in dense.tensor.styles.items() if ".mlp" not in name}
    shared = "blocks.*.mlp.shared"
    styles |= {shared: "gather", f"{shared}.w1": "columns", f"{shared}.w3": "columns", f"{shared}.w2": "rows"}
    return replace(
        dense,
        fsdp_units=(("tokens", "positions"), ("norm", "output")),
        tensor=TensorPlan(styles, dense.tensor.divides),
        experts=ExpertPlan("blocks.*.mlp", SHAPE.num_experts, SHAPE.top_k),
    )


SPEC = replace(
    minimal_gpt.SPEC,
    name="outside_moe",
    flavors={"small": Args(64, 3, 4, vocab_size=384, max_seq_len=512)},
    build=GPT,
    initial=initial,
    plan=plan,
)
