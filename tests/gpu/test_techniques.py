"""What techniques are for, where it can be measured: real products in float8, peak memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.config.techniques import Float8

GPU = torch.device("cuda", 0)


def _float8(section: Float8 | None) -> list[Tensor]:
    """The output of two linear layers and the gradients of input and weights, in bfloat16."""
    from torchtitan_lite.quantization.float8 import apply_float8

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 128, bias=False)).to(GPU, torch.bfloat16)
    x = torch.randn(64, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    if section is not None:
        apply_float8(model, section, GPU)
    out = model(x)
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [each.detach().float() for each in (out, x.grad, *grads)]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_products_in_float8_are_what_emulation_says(recipe: str) -> None:
    if torch.cuda.get_device_capability(GPU) < (8, 9):
        pytest.skip("no products in float8 before compute capability 8.9")
    plain, emulated = _float8(None), _float8(Float8(recipe, emulate=True))  # type: ignore[arg-type]
    real = _float8(Float8(recipe))  # type: ignore[arg-type]
    for exact, rounded, found in zip(plain, emulated, real, strict=True):
        # Accumulated in another order and precision, which is little beside float8's rounding.
        assert (found - rounded).norm() < 0.02 * exact.norm()
    assert (real[0] - plain[0]).norm() > 0.01 * plain[0].norm(), "nothing was rounded to float8"


@pytest.mark.gpu
def test_a_loss_in_parts_has_the_logits_of_one_part() -> None:
    from torchtitan_lite.optim.chunked_loss import chunked_loss_sum, loss_and_gradient
    from torchtitan_lite.optim.loss import token_loss_sum

    tokens, vocabulary, dim, chunks = 8192, 32768, 256, 16
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, dim, device=GPU) / dim**0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=GPU)

    def peak(parts: int) -> tuple[int, float]:
        """Bytes beyond what was there before; the loss."""
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if parts == 1:
            loss = token_loss_sum(F.linear(hidden, weight)[None], labels[None])
        else:
            loss = chunked_loss_sum(hidden, weight, labels, parts, loss_and_gradient, None)
        loss.backward()
        return torch.cuda.max_memory_allocated() - before, loss.item()

    peak(chunks)  # what libraries allocate for themselves with their first product
    (all_at_once, expected), (in_parts, loss) = peak(1), peak(chunks)
    assert loss == pytest.approx(expected, rel=1e-3)
    # A part's logits in both types, their gradient, those of the part before; the matrix's sum, product and gradients.
    assert in_parts < 16 * tokens * vocabulary / chunks + 16 * vocabulary * dim + 8 * tokens * dim
    assert all_at_once > 6 * tokens * vocabulary
