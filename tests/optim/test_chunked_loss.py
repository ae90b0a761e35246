"""Output matrix and loss in chunks of tokens: the loss and the gradients of the whole, and no logits of the whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_lite.optim import chunked_loss
from torchtitan_lite.optim.chunked_loss import ChunkedHead, chunked_loss_sum, loss_and_gradient
from torchtitan_lite.optim.loss import IGNORE

TOKENS, DIM, VOCABULARY = 37, 8, 24


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[3:7] = IGNORE
    return hidden, weight, labels


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunks", [1, 2, 5, 37, 50])
def test_it_is_the_loss_of_the_whole(chunks: int) -> None:
    hidden, weight, labels = given()
    expected = whole(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = chunked_loss_sum(hidden, weight, labels, chunks, loss_and_gradient, None)
    grads = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert torch.allclose(loss, expected, rtol=1e-6)
    for grad, right in zip(grads, expected_grads, strict=True):
        assert (grad - right).norm() <= 1e-6 * right.norm()
    assert torch.equal(grads[0][3:7], torch.zeros(4, DIM))


def test_bfloat16_sums_over_chunks_in_float32() -> None:
    hidden, weight, labels = given(torch.bfloat16)
    exact = torch.autograd.grad(whole(hidden.double(), weight.double(), labels) * 0.3, (hidden, weight))

    def error(loss: Tensor) -> list[float]:
        grads = torch.autograd.grad(loss * 0.3, (hidden, weight))
        return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(grads, exact, strict=True)]

    plain, chunked = (
        error(whole(hidden, weight, labels)),
        error(chunked_loss_sum(hidden, weight, labels, 37, loss_and_gradient, None)),
    )
    assert all(mine <= 1.5 * its for mine, its in zip(chunked, plain, strict=True)), (chunked, plain)


@pytest.mark.parametrize("works", [True, False])
def test_products_are_added_where_they_are_computed_if_torch_can(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """As on CUDA; one that gives wrong numbers is not taken."""
    sums: list[tuple[int, ...]] = []

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out_dtype == total.dtype == torch.float32
        assert out is total
        sums.append(tuple(total.shape))
        return out.addmm_(left.float(), right.float()) if works else out.zero_()

    hidden, weight, labels = given(torch.bfloat16)
    expected = torch.autograd.grad(chunked_loss_sum(hidden, weight, labels, 4, loss_and_gradient, None), weight)
    chunked_loss._sums_within_products.cache_clear()
    monkeypatch.setattr(torch, "addmm", addmm)
    try:
        found = torch.autograd.grad(chunked_loss_sum(hidden, weight, labels, 4, loss_and_gradient, None), weight)
    finally:
        chunked_loss._sums_within_products.cache_clear()
    assert sums == [(16, 16), *[(VOCABULARY, DIM)] * 4 * works]
    assert (found[0].float() - expected[0].float()).norm() < 1e-2 * expected[0].float().norm()


def test_a_part_takes_and_gives_the_type_of_the_product() -> None:
    """What casts is then in the compiled part."""
    hidden, weight, labels = given(torch.bfloat16)
    types = []

    def part(logits: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        loss, grad = loss_and_gradient(logits, labels, group)
        types.append((logits.dtype, loss.dtype, grad.dtype))
        return loss, grad

    chunked_loss_sum(hidden, weight, labels, 1, part, None)
    assert types == [(torch.bfloat16, torch.float32, torch.bfloat16)]


class Largest(TorchDispatchMode):
    """The most rows of logits that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.dim() and each.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, each.numel() // VOCABULARY)
        return result


def test_logits_are_never_whole() -> None:
    hidden, weight, labels = given()
    with Largest() as seen:
        chunked_loss_sum(hidden, weight, labels, 4, loss_and_gradient, None).backward()
    assert seen.rows == 10
    with Largest() as seen, torch.no_grad():
        ChunkedHead(torch.nn.Parameter(weight.detach()), 3, loss_and_gradient)(hidden[None], labels=labels[None])
    assert seen.rows == 13
