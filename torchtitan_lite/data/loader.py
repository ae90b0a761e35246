"""This rank's micro-batches, as a pure function of (position, rank, ranks)."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchtitan_lite.config.resolution import BatchPlan
from torchtitan_lite.data.mixture import held_out_sample_at, held_out_samples, mixed_sample_at
from torchtitan_lite.data.order import sample_at
from torchtitan_lite.data.passed_over import Ranges, beyond
from torchtitan_lite.data.prepare import Prepared, Source, Split
from torchtitan_lite.optim.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels: int64 [batch, seq]; a label of IGNORE has no loss. documents: int64
    [batch, seq], the number of each token's document within its sample; None where attention crosses documents."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None


class _Tokens:
    """The memory-mapped shards of a split, as one sequence."""

    def __init__(self, source: Source, split: Split) -> None:
        dtype = np.dtype(source.dtype).newbyteorder("<")
        self._shards = [np.memmap(source.folder / name, dtype=dtype, mode="r") for name in split.files]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._ends[shard])
            offset = end - len(self._shards[shard])
            parts.append(self._shards[shard][start - offset : min(stop, end) - offset])
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SampleStore:
    """Samples of seq_len + 1 tokens of a part of all sources, numbered source after source.

    Within a source sample i starts at token i * seq_len: its last token, a label only, is the first input of the next.
    """

    def __init__(
        self, prepared: Prepared, part: Literal["train", "validation"], seq_len: int, *, document_mask: bool = False
    ) -> None:
        # A document begins with this token; None where nobody asks where.
        self._bos_id = prepared.sources[0].bos_id if document_mask else None
        splits: list[Split] = [getattr(source, part) for source in prepared.sources]
        self._tokens = [_Tokens(source, split) for source, split in zip(prepared.sources, splits, strict=True)]
        self._weights = prepared.weights
        self._counts = [split.samples(seq_len) for split in splits]
        self._firsts = [0, *accumulate(self._counts)]
        self.seq_len = seq_len
        self.samples = self._firsts[-1]

    def training_id(self, position: int, seed: int) -> int:
        """Id of the sample at `position` of training's order."""
        if len(self._counts) == 1:
            return sample_at(position, self.samples, seed)
        source, sample = mixed_sample_at(position, self._counts, self._weights, seed)
        return self._firsts[source] + sample

    def held_out_id(self, position: int) -> int:
        """Id of the sample at `position`, below held_out(), of the order of validation."""
        source, sample = held_out_sample_at(position, self._weights)
        return self._firsts[source] + sample

    def held_out(self) -> int:
        """Samples that a validation has: all of one source, of a mixture until its first source has no more."""
        return held_out_samples(self._counts, self._weights)

    def read(self, sample: int) -> np.ndarray:
        """Tokens of a sample: [seq_len + 1]."""
        source = bisect_right(self._firsts, sample) - 1
        start = (sample - self._firsts[source]) * self.seq_len
        return self._tokens[source].read(start, start + self.seq_len + 1)

    def batch(self, samples: Sequence[int], size: int) -> Batch:
        """A micro-batch of `size` rows: the samples, then zero-weight rows."""
        rows = torch.zeros((size, self.seq_len + 1), dtype=torch.int64)
        for row, sample in enumerate(samples):
            rows[row] = torch.from_numpy(self.read(sample).astype(np.int64))
        labels = rows[:, 1:].clone()
        labels[len(samples) :] = IGNORE
        tokens = rows[:, :-1].contiguous()
        documents = None if self._bos_id is None else (tokens == self._bos_id).cumsum(dim=1)
        return Batch(tokens, labels, documents)


class TrainLoader:
    """Micro-batches of training steps. `position` counts samples of the global order consumed so far: with seed,
    fingerprint, a mixture's weights and the run's `passed_over` (see read_passed_over) it is the whole state.

    taken: positions [begin, end) between which the last step's samples lie.
    """

    def __init__(
        self, store: SampleStore, plan: BatchPlan, batch_rank: int, seed: int, passed_over: Ranges = ()
    ) -> None:
        self._store, self._plan, self._seed = store, plan, seed
        self._share = plan.share(batch_rank)
        self.position, self.passed_over, self.taken = 0, passed_over, (0, 0)

    def sample_ids(self, position: int | None = None) -> list[int]:
        """Global ids of the samples of the coming step, or of that at `position`, in the order of the global batch."""
        start = self.position if position is None else position
        return [self._id(start, index) for index in range(self._plan.global_batch_size)]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the coming step; moves `position` past the global batch."""
        ids = [self._id(self.position, index) for index in self._share]
        size = self._plan.microbatch_size
        batches = [self._store.batch(ids[i * size : (i + 1) * size], size) for i in range(self._plan.microbatches)]
        last = beyond(self.passed_over, self.position, self._plan.global_batch_size - 1)
        self.taken = (beyond(self.passed_over, self.position, 0), last + 1)
        self.position = last + 1
        return batches

    def _id(self, position: int, index: int) -> int:
        return self._store.training_id(beyond(self.passed_over, position, index), self._seed)


def validation_batches(
    store: SampleStore, samples: int, size: int, batch_rank: int, batch_ranks: int
) -> Iterator[Batch]:
    """The first `samples` of a store in validation's order, `size` to a rank at a time, the rest zero-weight rows.

    Every rank gets the same number of batches.
    """
    samples = min(samples, store.held_out())
    per_step = size * batch_ranks
    for step in range(-(-samples // per_step)):
        start = step * per_step + batch_rank * size
        yield store.batch([store.held_out_id(index) for index in range(start, min(start + size, samples))], size)
