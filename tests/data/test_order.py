"""The order of samples: a permutation of every epoch that depends on nothing but its key."""

from itertools import pairwise

import pytest

from torchtitan_lite.data.order import permute, sample_at

_SEED_EPOCHS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2**63 - 1, 0)]


def _order(size: int, key: str) -> list[int]:
    return [permute(index, size, key) for index in range(size)]


def test_every_small_size_is_permuted() -> None:
    for size in range(1, 201):
        assert sorted(_order(size, "42/0")) == list(range(size)), size


@pytest.mark.parametrize("size", [255, 256, 257, 1023, 1024, 1025, 4096, 5000, 16_385])
def test_larger_sizes_around_powers_are_permuted(size: int) -> None:
    assert sorted(_order(size, "7/3")) == list(range(size))


def test_the_same_key_gives_the_same_order() -> None:
    assert _order(300, "42/0") == _order(300, "42/0")


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [[sample_at(epoch * 100 + index, 100, seed) for index in range(100)] for seed, epoch in _SEED_EPOCHS]
    assert len({tuple(order) for order in orders}) == len(_SEED_EPOCHS)
    for one, other in pairwise(orders):
        # Two random permutations agree in one place on average.
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_neighbours_in_the_order_are_no_neighbours_in_the_corpus() -> None:
    order = _order(2000, "42/0")
    assert order != sorted(order)
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 20
    assert sum(index == sample for index, sample in enumerate(order)) < 20


def test_positions_run_on_into_the_next_epoch() -> None:
    samples = [sample_at(position, 37, seed=5) for position in range(3 * 37)]
    for epoch in range(3):
        part = samples[epoch * 37 : (epoch + 1) * 37]
        assert sorted(part) == list(range(37))
        assert part == [permute(index, 37, f"5/{epoch}") for index in range(37)]


def test_a_single_sample_comes_in_every_epoch() -> None:
    assert [sample_at(position, 1, 42) for position in range(5)] == [0] * 5


def test_a_position_far_out_is_as_near_as_the_first() -> None:
    samples = 10**12 + 39
    assert 0 <= sample_at(5 * samples + 123, samples, 42) < samples


# Another order would feed a resumed run samples that it has seen: these values may never change.
@pytest.mark.parametrize(
    ("samples", "seed", "first", "expected"),
    [
        (10, 42, 0, [8, 2, 5, 4, 0, 9, 1, 3, 7, 6, 6, 1]),
        (1000, 42, 0, [376, 39, 787, 282, 382]),
        (1000, 7, 1998, [982, 412, 437, 377]),
        (10**12 + 39, 0, 5, [220279731925, 855208349840]),
    ],
)
def test_the_order_stays_what_it_was(samples: int, seed: int, first: int, expected: list[int]) -> None:
    assert [sample_at(first + index, samples, seed) for index in range(len(expected))] == expected
