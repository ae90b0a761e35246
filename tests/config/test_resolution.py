"""A global batch is shared out without gap or overlap, and every -1 is replaced by what it stands for."""

from dataclasses import replace

import pytest

from torchtitan_lite.config.resolution import plan_batch, resolve
from torchtitan_lite.config.schema import Job, JobConfig, LRScheduler, Parallelism, Training

BATCHES = [1, 2, 3, 5, 7, 8, 12, 17, 31, 32, 64, 100]
RANKS = [1, 2, 3, 4, 5, 7, 8, 16, 33, 128]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_shares_of_all_ranks_are_the_global_batch_in_order(batch: int, ranks: int) -> None:
    plan = plan_batch(batch, 4, ranks)
    shares = [plan.share(rank) for rank in range(ranks)]
    assert [position for share in shares for position in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_micro_batches_hold_the_largest_share_and_no_more_than_needed(batch: int, ranks: int) -> None:
    for most in (1, 2, 3, 8, 1000):
        plan = plan_batch(batch, most, ranks)
        largest = max(len(plan.share(rank)) for rank in range(ranks))
        assert plan.microbatches * plan.microbatch_size >= largest
        assert 1 <= plan.microbatch_size <= most
        assert (plan.microbatches - 1) * most < largest, "one micro-batch fewer would do"
        assert plan.microbatches * (plan.microbatch_size - 1) < largest, "a smaller micro-batch would do"


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "microbatches", "size", "shares"),
    [
        (8, 8, 1, 1, 8, [8]),
        (8, 8, 2, 1, 4, [4, 4]),
        (8, 2, 2, 2, 2, [4, 4]),
        (8, 8, 3, 1, 3, [3, 3, 2]),
        (10, 3, 2, 2, 3, [5, 5]),
        (9, 4, 1, 3, 3, [9]),
        (2, 8, 4, 1, 1, [1, 1, 0, 0]),
    ],
)
def test_batches_by_hand(batch: int, most: int, ranks: int, microbatches: int, size: int, shares: list[int]) -> None:
    plan = plan_batch(batch, most, ranks)
    assert (plan.global_batch_size, plan.batch_ranks) == (batch, ranks)
    assert (plan.microbatches, plan.microbatch_size) == (microbatches, size)
    assert [len(plan.share(rank)) for rank in range(ranks)] == shares


def test_resolve_fills_in_what_minus_one_stands_for() -> None:
    config = JobConfig(training=Training(local_batch_size=3, steps=50))
    resolved = resolve(config, dp_shard=4, batch_ranks=8, dump_folder="outputs/run")
    assert resolved.training.global_batch_size == 24
    assert resolved.parallelism.data_parallel_shard_degree == 4
    assert resolved.lr_scheduler.total_steps == 50
    assert resolved.job.dump_folder == "outputs/run"


def test_resolve_keeps_what_a_recipe_says() -> None:
    config = JobConfig(
        job=Job(description="kept"),
        training=Training(global_batch_size=7, steps=50),
        parallelism=Parallelism(data_parallel_shard_degree=2),
        lr_scheduler=LRScheduler(total_steps=60),
    )
    resolved = resolve(config, dp_shard=2, batch_ranks=2, dump_folder="runs/1")
    assert resolved == replace(config, job=Job(dump_folder="runs/1", description="kept"))


def test_resolve_twice_is_resolve_once() -> None:
    once = resolve(JobConfig(), dp_shard=2, batch_ranks=2, dump_folder="runs/1")
    assert resolve(once, dp_shard=2, batch_ranks=2, dump_folder="runs/1") == once
