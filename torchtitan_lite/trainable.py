"""What the trainer drives, whatever the mesh: one step's forward and backward, and evaluation.

A rank's micro-batches are whole sequences; ranks that share a sequence read the same ones and take their part here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.context_parallel import SequenceShare, document_mask
from torchtitan_lite.distributed.data_parallel import reduce_gradients
from torchtitan_lite.observability.phases import span
from torchtitan_lite.optim.loss import IGNORE

if TYPE_CHECKING:
    from torchtitan_lite.balance import Balance


TokenLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """What this rank has of a batch and of the loss.

    device: where it computes. seq_len: tokens of a whole sequence. share: its part of each sequence.
    gives_loss: whether the model takes labels and gives the sum of their losses, in the place of logits. loss: from
    what it gives and labels [batch, seq] to that sum.
    counts: whether it counts the labels of its batches, of which other ranks have copies. reports: whether its loss
    is a part of the sum, and no copy of another rank's.
    """

    device: torch.device
    seq_len: int
    share: SequenceShare
    gives_loss: bool
    loss: TokenLoss
    counts: bool
    reports: bool


class TrainableModel(ABC):
    """parts: this rank's modules, one or a pipeline's stages; no two hold a parameter of the same name.

    balance: of the model's experts; None for a dense one.
    """

    def __init__(self, parts: Sequence[nn.Module], place: Place, balance: "Balance | None") -> None:
        self.parts, self.place, self.balance = list(parts), place, balance
        self._rows = place.share.positions(place.seq_len)
        self._positions = self._rows.to(place.device)
        self._queries = place.share.query_positions(place.seq_len).to(place.device)
        self._whole = len(self._rows) == place.seq_len

    @abstractmethod
    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Accumulate gradients over this rank's micro-batches of one step.

        Returns this rank's part of the loss (float32 scalar); the parts of all ranks sum to the mean over the valid
        tokens of the global batch. Gradients come out as those of that mean.
        """

    @abstractmethod
    def loss_sums(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Forward only: sums of this rank's token losses, float32 scalars."""

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """The mean loss over the valid tokens of all ranks' batches: float64 scalar, the same on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)

        def counted() -> Iterator[Batch]:
            for batch in batches:
                sums[1] += (batch.labels != IGNORE).sum() if self.place.counts else 0
                yield batch

        for loss in self.loss_sums(counted()):
            sums[0] += self.reported(loss)
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> Mapping[str, Tensor]:
        return {name: value for part in self.parts for name, value in part.state_dict().items()}

    def part_of(self, rows: Tensor) -> Tensor:
        """This rank's positions of whole sequences [batch, seq], on its device."""
        return self.on_device(rows if self._whole else rows[:, self._rows])

    def arguments(
        self, documents: Tensor | None, weights_B: Tensor | None, labels: Tensor | None
    ) -> dict[str, Tensor | None]:
        """What a model's forward takes beside tokens; documents: whole sequences [batch, seq]; weights_B: as from
        sample_weights; labels: this rank's part, used where the model gives the loss."""
        mask = None if documents is None else document_mask(self.on_device(documents), self._queries)
        routing = {} if weights_B is None else {"weights_B": weights_B}
        loss = {"labels": labels} if self.place.gives_loss else {}
        return {"positions_L": self._positions, "mask": mask, **routing, **loss}

    def on_device(self, host: Tensor) -> Tensor:
        if host.device.type == self.place.device.type:
            return host
        # Only a copy from pinned memory leaves the host free to go on.
        return host.pin_memory().to(self.place.device, non_blocking=True)

    def reported(self, loss: Tensor) -> Tensor:
        """This rank's part of a sum over all ranks: zero where another one has the same loss."""
        return loss if self.place.reports else torch.zeros_like(loss)

    def valid_counts(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Tokens with a label and samples with one in the global batch: int64 scalars; a float32 would round sums
        above 2^24."""
        rows = [(batch.labels != IGNORE).sum(1) for batch in batches] if self.place.counts else []
        tokens, samples = sum(int(row.sum()) for row in rows), sum(int((row > 0).sum()) for row in rows)
        # Filled on the device: a copy from the host would wait for it.
        counts = torch.full((2,), tokens, dtype=torch.int64, device=self.place.device)
        counts[1].fill_(samples)
        dist.all_reduce(counts)
        return counts[0], counts[1]

    def sample_weights(self, batch: Batch, samples: Tensor) -> Tensor:
        """Of each sample in a mean over the `samples` of the global batch: float32 [batch], 0 where one has no
        label."""
        return self.on_device((batch.labels != IGNORE).any(1)) / samples


class WholeModel(TrainableModel):
    """A rank that holds (its shards of) all layers. whole_gradients: see reduce_gradients."""

    def __init__(self, module: nn.Module, place: Place, balance: "Balance | None", *, whole_gradients: bool) -> None:
        super().__init__([module], place, balance)
        self._whole_gradients = whole_gradients

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        (module,) = self.parts
        valid, samples = self.valid_counts(batches)
        total = torch.zeros((), device=self.place.device)
        for index, batch in enumerate(batches):
            reduce_gradients(module, index == len(batches) - 1, whole=self._whole_gradients)
            weights = None if self.balance is None else self.sample_weights(batch, samples)
            with span("forward"):
                loss = self._loss_sum(batch, weights) / valid
            with span("backward"):
                loss.backward()
            total += loss.detach()
        return self.reported(total)

    def loss_sums(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        return (self._loss_sum(batch) for batch in batches)

    def _loss_sum(self, batch: Batch, weights_B: Tensor | None = None) -> Tensor:
        (module,) = self.parts
        labels = self.part_of(batch.labels)
        output = module(self.part_of(batch.tokens), **self.arguments(batch.documents, weights_B, labels))
        return self.place.loss(output, labels)
