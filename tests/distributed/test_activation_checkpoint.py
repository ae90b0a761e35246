"""Checkpointing: what is kept, what is computed again, and the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import DEEP_LLAMA, DEEP_QWEN, MOE
from torchtitan_lite.config.techniques import ActivationCheckpoint
from torchtitan_lite.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.spec import ModelSpec

FULL, SECOND = ActivationCheckpoint("full"), ActivationCheckpoint("selective", "2")
OP = ActivationCheckpoint("selective", "op")
MODELS = [(DEEP_LLAMA, "untied"), (DEEP_QWEN, "tied"), (MOE, "shared")]


def build(spec: ModelSpec, flavor: str, section: ActivationCheckpoint) -> nn.Module:
    args = spec.flavors[flavor]
    model = spec.build(args)
    initialize(model, 1, lambda name: spec.initial(name, args))
    apply_activation_checkpoint(model, spec.plan(args), section)
    return model


def step(model: nn.Module, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(384, (2, 33), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1], **weights)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("section", [FULL, SECOND, OP], ids=["full", "every second", "op"])
@pytest.mark.parametrize(("spec", "flavor"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_the_same_bits(spec: ModelSpec, flavor: str, section: ActivationCheckpoint) -> None:
    weights = {"weights_B": torch.tensor([0.5, 0.5])} if spec is MOE else {}
    plain = build(spec, flavor, ActivationCheckpoint("none"))
    loss, grads = step(plain, weights)
    again = build(spec, flavor, section)
    assert [name for name, _ in again.named_modules()] == [name for name, _ in plain.named_modules()]
    loss_again, grads_again = step(again, weights)
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name
    # What is counted in a step is counted once, however often the forward runs.
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += op is torch.ops.aten.mm.default
        self.attentions += "_scaled_dot_product" in str(op) and "backward" not in str(op)
        return op(*args, **(kwargs or {}))


def counted(section: ActivationCheckpoint) -> tuple[int, int]:
    """Products and attentions beyond those of a step that keeps everything."""
    totals = []
    for each in (section, ActivationCheckpoint("none")):
        model = build(DEEP_LLAMA, "untied", each)
        with Products() as counts:
            step(model, {})
        totals.append((counts.products, counts.attentions))
    return totals[0][0] - totals[1][0], totals[0][1] - totals[1][1]


def test_what_is_computed_again() -> None:
    # Eight blocks of seven products and an attention. The block's last product is needed by no gradient.
    assert counted(FULL) == (8 * 6, 8)
    assert counted(SECOND) == (4 * 6, 4)
    # Of wq, wk, wv, wo, w1, w3, w2 every second is kept.
    assert counted(OP) == (8 * 3, 0)
    # w1 and w3 have one shape: both again, and every second of the rest is kept: wq, wv, w2.
    forced = ActivationCheckpoint("selective", "op", ["feed_forward.w1"])
    assert counted(forced) == (8 * 4, 0)


def test_scales_of_float8_are_kept() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x / x.detach().abs().max()).sin()  # as float8 divides by the largest number, and needs the result

    model = nn.ModuleDict({"layers": nn.ModuleDict({"0": Scaled()})})
    apply_activation_checkpoint(model, ParallelPlan(fsdp_units=(("layers.*",),)), OP)
    with Counted("aten::max") as counts:
        model["layers"]["0"](torch.ones(4, requires_grad=True)).sum().backward()
    assert counts.calls == 1


class Counted(TorchDispatchMode):
    """Counts an operation by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op._schema.name == self.name
        return op(*args, **(kwargs or {}))


def test_a_name_of_no_matrix_is_refused() -> None:
    with pytest.raises(UserError, match=r'"feed_forward\.w9" is the end of no'):
        build(DEEP_LLAMA, "untied", ActivationCheckpoint("selective", "op", ["feed_forward.w9"]))
