"""A model in pipeline stages, driven as any other (see trainable)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.pipeline import apply_pipeline_parallel, forward_only, pieces_marked
from torchtitan_lite.distributed.pipeline_plan import PipelinePlan
from torchtitan_lite.optim.loss import IGNORE
from torchtitan_lite.trainable import Place, TrainableModel

if TYPE_CHECKING:
    from torchtitan_lite.balance import Balance


class StagedModel(TrainableModel):
    """A rank that holds some stages of a pipeline, `parts`, over the one axis of `mesh`.

    All micro-batches of a step go through one call of the schedule. edges: as in apply_pipeline_parallel.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        place: Place,
        balance: "Balance | None",
        mesh: DeviceMesh,
        plan: PipelinePlan,
        edges: Callable[[int], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(parts, place, balance)
        own = plan.stages_of(mesh.get_local_rank())
        self._microbatches, self._first, self._last = plan.microbatches, 0 in own, len(plan.stages) - 1 in own
        self._divisor = torch.ones((), dtype=torch.int64, device=place.device)
        for part in parts:
            # What every stage needs beside hidden states comes from here, not from the stage before.
            part.register_forward_pre_hook(self._with_arguments, with_kwargs=True)
        self._schedule = apply_pipeline_parallel(
            parts, mesh, plan, device=place.device, edges=edges, loss=self._microbatch_loss
        )

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        self._divisor, samples = self.valid_counts(batches)
        return self.reported(self._run(self._schedule.step, batches, samples))

    def loss_sums(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        self._divisor = torch.ones_like(self._divisor)
        waiting = iter(batches)
        while some := list(islice(waiting, self._microbatches)):
            empty = Batch(
                torch.zeros_like(some[0].tokens),
                torch.full_like(some[0].labels, IGNORE),
                None if some[0].documents is None else torch.zeros_like(some[0].documents),
            )
            with forward_only(self._schedule):
                yield self._run(self._schedule.eval, [*some, *[empty] * (self._microbatches - len(some))])

    def _run(self, call: Callable[..., Any], batches: Sequence[Batch], samples: Tensor | None = None) -> Tensor:
        """samples: of the global batch, where it is trained on."""
        tokens = (self.part_of(torch.cat([batch.tokens for batch in batches])),) if self._first else ()
        labels = self.part_of(torch.cat([batch.labels for batch in batches])) if self._last else None
        documents = [batch.documents for batch in batches if batch.documents is not None]
        # Moved here: FSDP would move it too, from memory that is not pinned.
        given = {"documents": self.on_device(torch.cat(documents))} if documents else {}
        if samples is not None and self.balance is not None:
            given["weights_B"] = torch.cat([self.sample_weights(batch, samples) for batch in batches])
        if labels is not None and self.place.gives_loss:
            given["labels"] = labels
        losses: list[Tensor] = []
        with pieces_marked(self._schedule):
            call(*tokens, target=labels, losses=losses if self._last else None, return_outputs=False, **given)
        if not losses:
            return torch.zeros((), device=self.place.device)
        return torch.stack(losses).detach().sum()

    def _microbatch_loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return self.place.loss(output, labels) / self._divisor

    def _with_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, self.arguments(kwargs.get("documents"), kwargs.get("weights_B"), kwargs.get("labels"))
