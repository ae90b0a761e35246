"""Bugs of mixtures of experts and of expert parallelism (see mutants)."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.models.test_moe import _nothing_in_the_tail
from tests.parity.cases import mixture
from tests.parity.mutant import MODEL, PRODUCT, mutant, replaced

_DISPATCH = f"{PRODUCT}.distributed.expert_parallel"
_ROUTING = f"{PRODUCT}.models.common.routing"
_MOE = f"{PRODUCT}.models.common.moe"
_ODD = {"training.global_batch_size": 7}
_CAPACITY = {"moe.capacity_factor": 1.0}


# Gradients


@mutant("expert gradients divided by ep", mixture(2, ep=2))
def expert_gradients_divided() -> Iterator[None]:
    def dividing(right: Any) -> Any:
        def apply(model: Any, mesh: Any, plan: Any, experts_mesh: Any) -> None:
            right(model, mesh, plan, experts_mesh)
            for name, module in model.named_modules():
                if name.endswith(".experts"):
                    module.set_gradient_divide_factor(2.0)

        return apply

    with replaced(f"{PRODUCT}.assembly.apply_data_parallel", dividing):
        yield


@mutant("router's gradient of a rank's part of the sequence only", mixture(2, tp=2))
def router_unsummed() -> Iterator[None]:
    def unsummed(weight: Any) -> Tensor:
        return weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[no-any-return]

    with patch(f"{_MOE}.local", unsummed):
        yield


@mutant("experts left out of the norm's sum over ep", mixture(2, ep=2))
def norm_without_other_experts() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def sharded_over(grad: Any) -> Any:
            mesh, axes = right(grad)
            return mesh, tuple(axis for axis in axes if mesh.mesh_dim_names[axis] != "ep")

        return sharded_over

    with replaced(f"{PRODUCT}.optim.gradients._sharded_over", wrong):
        yield


# Dispatch


@mutant("a token combined twice", mixture(2, ep=2))
def combined_twice() -> Iterator[None]:
    def twice(right: Any) -> Any:
        def sums(self: Any, rows: Tensor, weights: Tensor) -> Tensor:
            once = right(self, rows, weights)
            return torch.cat((once[:1] * 2, once[1:]))

        return sums

    with replaced(f"{_DISPATCH}.Sorted.sums", twice):
        yield


@mutant("tail of the grouped product read", mixture(2, recipe=_CAPACITY))
def tail_read() -> Iterator[None]:
    def unselected(right: Any) -> Any:
        def where(self: Tensor, condition: Tensor, other: Any) -> Tensor:
            if condition.dim() == 2 and condition.shape[1] == 1 and other == 0.0:
                return self
            return right(self, condition, other)  # type: ignore[no-any-return]

        return where

    # Fresh memory may be zeros: what stands in the tail stands there by chance.
    with _nothing_in_the_tail(), replaced("torch.Tensor.where", unselected):
        yield


@mutant("what experts of a rank give back in the order of experts, not of ranks", mixture(2, ep=2))
def returned_out_of_order() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def computed(self: Any, rows: Tensor, counts: Tensor, compute: Any) -> Tensor:
            return right(self, rows, counts.flip(0), compute)  # type: ignore[no-any-return]

        return computed

    with replaced(f"{_DISPATCH}.AllToAll._computed", wrong):
        yield


@mutant("second half of the tokens with the weights of the first", mixture(2, ep=2, halves=True))
def halves_mixed_up() -> Iterator[None]:
    def first(right: Any) -> Any:
        def split(self: Tensor, parts: Any, *args: Any) -> Any:
            made = right(self, parts, *args)
            return (made[0], made[0][: len(made[1])]) if self.dtype == torch.float32 and self.shape[1] == 2 else made

        return split

    with replaced("torch.Tensor.tensor_split", first):
        yield


@mutant("experts of each rank drawn as the first ones", mixture(2, ep=2))
def experts_by_local_index() -> Iterator[None]:
    def first(right: Any) -> Any:
        def fill(local: Tensor, name: str, *args: Any) -> None:
            stem, _, index = name.rpartition(".")
            right(local, f"{stem}.{int(index) % 4}" if index.isdigit() else name, *args)

        return fill

    with replaced(f"{PRODUCT}.models.common.initialize._fill_part", first):
        yield


# Balance


@mutant("bias updated on each rank by its own counts", mixture(2, ep=2))
def bias_per_rank() -> Iterator[None]:
    with patch(f"{PRODUCT}.balance.dist", SimpleNamespace(all_reduce=lambda tensor: None)):
        yield


@mutant("bias moved twice a step", mixture(2, local=1))
def bias_twice() -> Iterator[None]:
    def twice(right: Any) -> Any:
        def step(self: Any, skip: Any) -> Tensor:
            self._rate *= 2
            counted = right(self, skip)
            self._rate /= 2
            return counted  # type: ignore[no-any-return]

        return step

    with replaced(f"{PRODUCT}.balance.Balance.step", twice):
        yield


@mutant("bias moves weights too", mixture(2, ep=2))
def bias_in_the_weights() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def forward(self: Any, logits: Tensor, bias: Tensor, weights: Any) -> Any:
            return right(self, logits + bias, torch.zeros_like(bias), weights)

        return forward

    with replaced(f"{_ROUTING}.Routing.forward", wrong):
        yield


@mutant("balance loss averaged over ranks instead of samples", mixture(2, recipe=_ODD))
def balance_over_ranks() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def counts(self: Any, batches: Any) -> Any:
            tokens, samples = right(self, batches)
            own = sum(int((batch.labels != -100).any(1).sum()) for batch in batches)
            return tokens, torch.full_like(samples, 2 * own)

        return counts

    with replaced(f"{MODEL}.valid_counts", wrong):
        yield


@mutant("balance loss from a rank's part of a sample", mixture(2, cp=2))
def balance_of_parts() -> Iterator[None]:
    with patch(f"{_ROUTING}.all_reduce", lambda counts, op, group: counts):
        yield


@mutant("samples that fill up a batch count", mixture(3, recipe=_ODD, local=1))
def padding_counts() -> Iterator[None]:
    with replaced(f"{MODEL}.sample_weights", lambda right: lambda self, *args: right(self, *args).clamp(min=1e-12)):
        yield


@mutant("balance loss reported as part of the loss", mixture(2, ep=2))
def balance_in_the_loss() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def forward_backward(self: Any, batches: Any) -> Tensor:
            loss = right(self, batches)
            return loss + sum(1e-3 * moe.counted[-2].float() for moe in self.balance._own.values())  # type: ignore[no-any-return]

        return forward_backward

    with replaced(f"{PRODUCT}.trainable.WholeModel.forward_backward", wrong):
        yield


@mutant("capacity of a rank's part of a sample", mixture(2, recipe=_CAPACITY, cp=2))
def capacity_of_parts() -> Iterator[None]:
    def alone(right: Any) -> Any:
        def within(self: Any, chosen: Tensor, experts: int, factor: float) -> Tensor:
            sharers, self.sharers = self.sharers, None
            kept = right(self, chosen, experts, factor)
            self.sharers = sharers
            return kept  # type: ignore[no-any-return]

        return within

    with replaced(f"{_ROUTING}.Routing._within_capacity", alone):
        yield


@mutant("capacity by the order of ranks instead of positions", mixture(2, recipe=_CAPACITY, cp=2))
def capacity_out_of_order() -> Iterator[None]:
    with replaced(
        f"{_ROUTING}.Sharers", lambda right: lambda group, positions: right(group, torch.arange(len(positions)))
    ):
        yield
