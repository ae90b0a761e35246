"""Which parameters decay, and clipping on plain tensors."""

import pytest
import torch
from torch import nn

from torchtitan_lite.config.optimizing import Optimizer, ParamGroup
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.groups import require_groups, settings_of
from torchtitan_lite.optim.loss import IGNORE, token_loss_sum
from torchtitan_lite.optim.optimizer import build_optimizer, set_lr


def _model() -> nn.Module:
    with torch.device("meta"):
        return SPEC.build(SPEC.flavors["debugmodel"])


def _decaying(config: Optimizer) -> set[str]:
    model = _model()
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


GROUPS = [
    ParamGroup("layers.0.*", lr_factor=0.5),
    ParamGroup("*norm*", weight_decay=0.3, beta1=0.8, beta2=0.99),
    ParamGroup("*.wq.*", weight_decay=0.0),
]


def test_the_first_group_that_matches_counts() -> None:
    config = Optimizer(weight_decay=0.2, param_groups=GROUPS)
    for name, expected in {
        "layers.0.attention.wq.weight": (0.5, 0.2, 0.9, 0.95),
        "layers.0.attention_norm.weight": (0.5, 0.0, 0.9, 0.95),
        "layers.1.attention_norm.weight": (1.0, 0.3, 0.8, 0.99),
        "layers.1.attention.wq.weight": (1.0, 0.0, 0.9, 0.95),
        "output.weight": (1.0, 0.2, 0.9, 0.95),
    }.items():
        assert tuple(vars(settings_of(name, 2, config, None)).values()) == ("AdamW", *expected), name


def test_a_step_has_the_groups_rates_and_decays() -> None:
    names = ["layers.0.wo", "layers.1.wo", "layers.1.norm"]
    parameters = {name: nn.Parameter(torch.ones(2)) for name in names}
    optimizer = build_optimizer(Optimizer(weight_decay=0.2, param_groups=GROUPS), parameters.items())
    set_lr(optimizer, 0.1)
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    for name, rate, decay in zip(names, (0.05, 0.1, 0.1), (0.2, 0.2, 0.3), strict=True):
        # As in a first step by hand, below.
        assert torch.allclose(parameters[name].detach(), torch.ones(2) * (1 - rate * decay) - rate), name


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([ParamGroup("*.wx.*")], r'\[0\].pattern = "\*.wx.\*" matches no parameter; some are tok_embeddings.weight'),
        ([ParamGroup("*.weight"), ParamGroup("*.wq.*")], r"\[1\].* groups before it take all .*wq.weight first"),
    ],
)
def test_groups_of_nothing_are_refused(groups: list[ParamGroup], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        require_groups(_model(), Optimizer(param_groups=groups), None)


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


def test_a_norm_is_that_in_float64_whatever_the_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan_lite.optim.gradients._PIECE", 1000)
    made = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=made) for shape in ((2500,), (40, 75), (0, 3), ())]
    grads[1] = grads[1].t()
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(torch.zeros_like(grad, dtype=dtype)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.to(dtype)
        wide = torch.cat([grad.to(dtype).double().flatten() for grad in grads])
        assert clip_by_global_norm(parameters, 1e9, None).item() == pytest.approx(wide.norm().item(), rel=1e-14)


def test_the_loss_sums_over_valid_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 3]])
    log_probabilities = logits.log_softmax(-1)
    expected = -(log_probabilities[0, 0, 1] + log_probabilities[0, 2, 2] + log_probabilities[1, 2, 3])
    assert token_loss_sum(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert token_loss_sum(logits, torch.full((2, 3), IGNORE)).item() == 0.0
