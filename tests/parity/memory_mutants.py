"""Bugs of what saves memory: activation checkpointing and the loss in parts (see mutants)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import Replicate

from tests.parity.cases import FULL, case
from tests.parity.mutant import PRODUCT, mutant, replaced

_LOSS = f"{PRODUCT}.optim.chunked_loss"


@mutant("a block is computed again from another input", case(2, pp=2, **FULL))
def recomputed_from_another_input() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def run(function: Any, *args: Any, **options: Any) -> Any:
            forwards: list[None] = []

            def once_right(x: Tensor, *others: Any, **more: Any) -> Any:
                forwards.append(None)
                return function(x * (1.0 if len(forwards) == 1 else 1.01), *others, **more)

            return right(once_right, *args, **options)

        return run

    with replaced(f"{PRODUCT}.distributed.activation_checkpoint.checkpoint", wrong):
        yield


@mutant("hidden states' gradient of a rank's part of the vocabulary only", case(2, tp=2, loss_chunks=3))
def hidden_gradient_not_summed() -> Iterator[None]:
    with replaced(f"{_LOSS}.Partial", lambda right: Replicate):
        yield


@mutant("last, shorter part of the tokens has no gradient", case(2, loss_chunks=3))
def last_part_without_gradient() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        longest = [0]

        def part(logits: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
            longest[0] = max(longest[0], len(labels))
            loss, grad = right(logits, labels, group)
            return loss, grad * (len(labels) == longest[0])

        return part

    with replaced(f"{PRODUCT}.assembly.loss_and_gradient", wrong):
        yield
