"""Which parameters decay, and clipping on plain tensors."""

import pytest
import torch
from torch import nn

from torchtitan_lite.config.schema import Optimizer
from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.loss import IGNORE, token_loss_sum
from torchtitan_lite.optim.optimizer import build_optimizer


def _decaying(config: Optimizer) -> set[str]:
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavors["debugmodel"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(config, model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def test_norms_do_not_decay_unless_asked() -> None:
    decaying = _decaying(Optimizer())
    assert "layers.0.attention.wq.weight" in decaying
    assert "tok_embeddings.weight" in decaying
    assert not any("norm" in name for name in decaying)
    assert "norm.weight" in _decaying(Optimizer(weight_decay_exclude=[]))
    assert "tok_embeddings.weight" not in _decaying(Optimizer(weight_decay_exclude=["tok_embeddings.*"]))


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_step_is_adamw_by_hand(implementation: str) -> None:
    config = Optimizer(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5, implementation=implementation)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer(config, [("w", parameter)])
    parameter.grad = torch.tensor([0.3, 0.4])
    optimizer.step()
    # First step: both moments, bias corrected, are g and g^2, so the update is the sign of g.
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1
    assert torch.allclose(parameter.detach(), expected, atol=1e-6)


def test_clipping_scales_to_the_norm_and_no_smaller_gradient() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = clip_by_global_norm(parameters, 1.0, None)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(5.0, rel=1e-12)
    assert torch.allclose(parameters[0].grad, torch.tensor([0.6, 0.0]), atol=1e-6)
    assert clip_by_global_norm(parameters, 10.0, None).item() == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(parameters[1].grad, torch.tensor([0.8]), atol=1e-6)
    assert clip_by_global_norm(parameters, float("inf"), None).item() == pytest.approx(1.0, abs=1e-6)


def test_the_loss_sums_over_valid_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 3]])
    log_probabilities = logits.log_softmax(-1)
    expected = -(log_probabilities[0, 0, 1] + log_probabilities[0, 2, 2] + log_probabilities[1, 2, 3])
    assert token_loss_sum(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert token_loss_sum(logits, torch.full((2, 3), IGNORE)).item() == 0.0
