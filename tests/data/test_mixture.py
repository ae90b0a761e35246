"""The order of a mixture: exact proportions, epochs of each source, nothing but the position as state."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from torchtitan_lite.config.resolution import plan_batch
from torchtitan_lite.data import mixture
from torchtitan_lite.data.loader import SampleStore, TrainLoader, validation_batches
from torchtitan_lite.data.mixture import held_out_sample_at, held_out_samples, mixed_sample_at
from torchtitan_lite.data.prepare import Prepared, Source, Split
from torchtitan_lite.optim.loss import IGNORE

SEQ_LEN = 4
MIXTURES = [((10, 7), (3, 1)), ((5, 100, 23), (2, 5, 1)), ((1, 1), (1, 1)), ((9, 4), (8, 8)), ((3, 50), (20, 1))]


def _order(samples: Sequence[int], weights: tuple[int, ...], positions: int, seed: int = 42) -> list[tuple[int, int]]:
    return [mixed_sample_at(position, samples, weights, seed) for position in range(positions)]


@pytest.mark.parametrize(("samples", "weights"), MIXTURES)
def test_every_window_holds_exactly_the_weights(samples: tuple[int, ...], weights: tuple[int, ...]) -> None:
    size = sum(weights)
    sources = [source for source, _ in _order(samples, weights, 40 * size)]
    for window in range(40):
        assert Counter(sources[window * size : (window + 1) * size]) == dict(enumerate(weights)), window


@pytest.mark.parametrize(("samples", "weights"), MIXTURES)
def test_every_source_goes_through_each_of_its_epochs_once(samples: tuple[int, ...], weights: tuple[int, ...]) -> None:
    order = _order(samples, weights, 40 * sum(weights))
    for source, count in enumerate(samples):
        own = [sample for at, sample in order if at == source]
        assert len(own) == 40 * weights[source]
        for start in range(0, len(own) - count + 1, count):
            assert sorted(own[start : start + count]) == list(range(count)), (source, start)


def test_any_position_is_found_without_those_before() -> None:
    samples, weights = (40, 25, 13), (4, 2, 3)
    order = _order(samples, weights, 300)
    for position in (299, 0, 150, 9, 8, 10, 299):
        mixture._dealt.cache_clear()
        assert mixed_sample_at(position, samples, weights, 42) == order[position]


def test_windows_seeds_and_sources_have_orders_of_their_own() -> None:
    def sources(start: int, seed: int) -> tuple[int, ...]:
        return tuple(mixed_sample_at(start + slot, (50, 50), (8, 8), seed)[0] for slot in range(16))

    assert len({sources(start, seed) for start in (0, 16, 32) for seed in (1, 2)}) == 6
    order = _order((50, 50), (1, 1), 100)
    first, second = ([sample for at, sample in order if at == source] for source in (0, 1))
    # Two random permutations agree in one place on average.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


# Another order would feed a resumed run samples that it has seen: these values may never change.
def test_the_order_stays_what_it_was() -> None:
    assert _order((10, 7), (3, 1), 8) == [(1, 5), (0, 2), (0, 7), (0, 5), (0, 1), (0, 9), (0, 4), (1, 0)]
    assert [mixed_sample_at(10**9 + index, (10**6, 77), (5, 3), 7) for index in range(4)] == [
        (1, 25),
        (1, 20),
        (0, 60635),
        (0, 6969),
    ]


@pytest.mark.parametrize("weights", [(3, 1), (700, 300), (1, 1, 1), (5, 2, 1)])
def test_any_stretch_of_validation_is_near_the_weights(weights: tuple[int, ...]) -> None:
    seen = [0] * len(weights)
    for position in range(2 * sum(weights)):
        source, sample = held_out_sample_at(position, weights)
        assert sample == seen[source], "in the order of the files"
        seen[source] += 1
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - (position + 1) * weight / sum(weights)) <= len(weights) / 2


@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (2, 5)])
@pytest.mark.parametrize("samples", [(1, 1), (30, 2), (2, 30), (7, 9), (6, 2)])
def test_validation_ends_where_the_first_source_does(samples: tuple[int, ...], weights: tuple[int, ...]) -> None:
    last = held_out_samples(samples, weights)
    assert all(sample < samples[source] for source, sample in (held_out_sample_at(p, weights) for p in range(last)))
    source, sample = held_out_sample_at(last, weights)
    assert sample == samples[source]


def test_of_one_source_validation_is_all_of_it_in_order() -> None:
    assert held_out_samples([9], (1,)) == 9
    assert [held_out_sample_at(position, (1,)) for position in range(9)] == [(0, index) for index in range(9)]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Two sources, of 12 and 5 samples for training and 7 and 3 held out; each token is its place, the second's from
    1,000 on."""
    sources = []
    for index, (train, held_out) in enumerate([(49, 29), (21, 13)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        np.arange(1000 * index, 1000 * index + train, dtype="<u2").tofile(folder / "t.bin")
        np.arange(1000 * index + 500, 1000 * index + 500 + held_out, dtype="<u2").tofile(folder / "v.bin")
        parts = Split(("t.bin",), train, 2), Split(("v.bin",), held_out, 2)
        sources.append(Source(f"source {index}", folder, Path("m"), "t", 2000, 9, f"f{index}", "uint16", *parts))
    return Prepared(tuple(sources), (3, 1))


def test_samples_are_numbered_source_after_source(prepared: Prepared) -> None:
    store = SampleStore(prepared, "train", SEQ_LEN)
    assert store.samples == 12 + 5
    for sample in range(12):
        assert store.read(sample).tolist() == list(range(sample * SEQ_LEN, sample * SEQ_LEN + SEQ_LEN + 1))
    for sample in range(5):
        assert store.read(12 + sample)[0] == 1000 + sample * SEQ_LEN
    assert (
        store.batch(
            [2, 12],
            2,
        ).documents
        is None
    )
    masked = SampleStore(prepared, "train", SEQ_LEN, document_mask=True).batch([2, 12], 2).documents
    assert masked is not None
    assert masked.tolist() == [[0, 1, 1, 1], [0] * SEQ_LEN]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_all_ranks_together_read_the_mixture_in_order(prepared: Prepared, ranks: int) -> None:
    store, plan = SampleStore(prepared, "train", SEQ_LEN), plan_batch(6, 2, ranks)
    loaders = [TrainLoader(store, plan, rank, seed=1) for rank in range(ranks)]
    for step in range(10):
        places = [mixed_sample_at(6 * step + index, (12, 5), (3, 1), 1) for index in range(6)]
        expected = [12 * source + sample for source, sample in places]
        assert all(loader.sample_ids() == expected for loader in loaders)
        starts = [
            int(row[0])
            for loader in loaders
            for batch in loader.next_step()
            for row, label in zip(batch.tokens, batch.labels, strict=True)
            if label[0] != IGNORE
        ]
        assert starts == [1000 * source + sample * SEQ_LEN for source, sample in places]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_takes_the_same_mixture_on_every_mesh(prepared: Prepared, ranks: int) -> None:
    store = SampleStore(prepared, "validation", SEQ_LEN)
    seen = [
        int(row[0])
        for rank in range(ranks)
        for batch in validation_batches(store, 1000, 2, rank, ranks)
        for row, label in zip(batch.tokens, batch.labels, strict=True)
        if label[0] != IGNORE
    ]
    # Seven of the first to two of the second: the eighth of the first is not there.
    assert sorted(seen) == [500 + SEQ_LEN * sample for sample in range(7)] + [1500, 1500 + SEQ_LEN]


def test_a_fingerprint_is_of_all_sources_in_order_and_one_source_keeps_its_own(prepared: Prepared) -> None:
    first, second = prepared.sources
    assert Prepared((first,)).fingerprint == first.fingerprint
    found = {Prepared(sources, (1, 1)).fingerprint for sources in ((first, second), (second, first), (first, first))}
    assert len(found) == 3
