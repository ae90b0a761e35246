"""Samples from shards, and a step's micro-batches as a function of position, rank and ranks."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchtitan_lite.config.resolution import plan_batch
from torchtitan_lite.data.loader import SampleStore, TrainLoader, validation_batches
from torchtitan_lite.data.order import sample_at
from torchtitan_lite.data.prepare import Prepared, Source, Split
from torchtitan_lite.optim.loss import IGNORE

SEQ_LEN = 4


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Tokens 0 ... 99 in shards of uneven length, so that samples cross them."""
    cuts = [0, 30, 31, 77, 100]
    files = []
    for index, (start, stop) in enumerate(pairwise(cuts)):
        files.append(f"train-{index:05d}.bin")
        np.arange(start, stop, dtype="<u2").tofile(tmp_path / files[-1])
    train, none = Split(tuple(files), 100, 4), Split((), 0, 0)
    source = Source("s", tmp_path, tmp_path / "tokenizer.model", "t", 100, 0, "f", "uint16", train, none)
    return Prepared((source,))


def _with(prepared: Prepared, **changes: Any) -> Prepared:
    return Prepared((replace(prepared.sources[0], **changes),))


@pytest.fixture
def store(prepared: Prepared) -> SampleStore:
    return SampleStore(prepared, "train", SEQ_LEN)


def test_samples_are_consecutive_tokens_whatever_the_shards(store: SampleStore) -> None:
    assert store.samples == 24
    for sample in range(store.samples):
        assert store.read(sample).tolist() == list(range(sample * SEQ_LEN, sample * SEQ_LEN + SEQ_LEN + 1))


def test_labels_are_the_next_tokens_and_empty_rows_have_no_weight(store: SampleStore) -> None:
    batch = store.batch([2, 5], 3)
    assert batch.tokens[0].tolist() == [8, 9, 10, 11]
    assert batch.labels[0].tolist() == [9, 10, 11, 12]
    assert torch.equal(batch.labels[:2, :-1], batch.tokens[:2, 1:])
    assert batch.labels[2].tolist() == [IGNORE] * SEQ_LEN


def test_documents_are_numbered_within_a_sample_from_begin_tokens(prepared: Prepared) -> None:
    # Token 9 begins documents: sample 2 is 8 9 10 11, sample 3 begins in the middle of one.
    masked = SampleStore(_with(prepared, bos_id=9), "train", SEQ_LEN, document_mask=True)
    batch = masked.batch([2, 3], 3)
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int64
    assert batch.documents.tolist() == [[0, 1, 1, 1], [0] * SEQ_LEN, [0] * SEQ_LEN]
    # A sample that opens with the token holds no document 0; its last token, a label only, opens none.
    for first, bos, numbers in ((2, 8, [1, 1, 1, 1]), (2, 12, [0, 0, 0, 0]), (2, 11, [0, 0, 0, 1])):
        store = SampleStore(_with(prepared, bos_id=bos), "train", SEQ_LEN, document_mask=True)
        documents = store.batch([first], 1).documents
        assert documents is not None
        assert documents.tolist() == [numbers]


def test_every_begin_token_of_a_sample_starts_another_document(prepared: Prepared) -> None:
    tokens = [5, 7, 1, 7, 7, 2, 3, 4, 7]
    np.asarray(tokens, dtype="<u2").tofile(prepared.sources[0].folder / "few.bin")
    split = Split(("few.bin",), len(tokens), 4)
    batch = SampleStore(_with(prepared, bos_id=7, train=split), "train", 8, document_mask=True).batch([0], 1)
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 1, 1, 2, 3, 3, 3, 3]]


def test_documents_are_numbered_only_where_attention_asks(store: SampleStore) -> None:
    assert store.batch([0, 1], 2).documents is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("local_batch", [1, 2, 8])
def test_all_ranks_together_read_the_global_batches_in_order(store: SampleStore, ranks: int, local_batch: int) -> None:
    plan = plan_batch(6, local_batch, ranks)
    loaders = [TrainLoader(store, plan, rank, seed=1) for rank in range(ranks)]
    for step in range(10):  # more than two epochs
        expected = [sample_at(6 * step + index, store.samples, 1) for index in range(6)]
        assert all(loader.sample_ids() == expected for loader in loaders)
        steps = [loader.next_step() for loader in loaders]
        assert {(len(batches), batches[0].tokens.shape) for batches in steps} == {
            (plan.microbatches, (plan.microbatch_size, SEQ_LEN))
        }
        starts = [
            int(row[0])
            for batches in steps
            for batch in batches
            for row, label in zip(batch.tokens, batch.labels, strict=True)
            if label[0] != IGNORE
        ]
        assert starts == [sample * SEQ_LEN for sample in expected]


def test_position_is_the_whole_state(store: SampleStore) -> None:
    plan = plan_batch(5, 8, 1)
    loader = TrainLoader(store, plan, 0, seed=3)
    steps = [loader.next_step()[0].tokens for _ in range(7)]
    resumed = TrainLoader(store, plan, 0, seed=3)
    resumed.position = 4 * 5
    assert torch.equal(resumed.next_step()[0].tokens, steps[4])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_reads_each_sample_once(store: SampleStore, ranks: int) -> None:
    seen: list[int] = []
    lengths = set()
    for rank in range(ranks):
        batches = list(validation_batches(store, 1000, 5, rank, ranks))
        lengths.add(len(batches))
        seen += [
            int(row[0])
            for batch in batches
            for row, label in zip(batch.tokens, batch.labels, strict=True)
            if label[0] != IGNORE
        ]
    assert lengths == {-(-24 // (5 * ranks))}
    assert sorted(seen) == [sample * SEQ_LEN for sample in range(24)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_takes_the_same_samples_on_every_mesh(store: SampleStore, ranks: int) -> None:
    seen = [
        int(row[0])
        for rank in range(ranks)
        for batch in validation_batches(store, 11, 2, rank, ranks)
        for row, label in zip(batch.tokens, batch.labels, strict=True)
        if label[0] != IGNORE
    ]
    assert sorted(seen) == [sample * SEQ_LEN for sample in range(11)]
