"""Values that follow from others, derived once and then fixed: no later part guesses again."""

from dataclasses import dataclass, replace

from torchtitan_lite.config.schema import JobConfig


@dataclass(frozen=True)
class BatchPlan:
    """How `global_batch_size` samples become micro-batches on `batch_ranks` ranks.

    Every rank runs the same number of micro-batches of the same shape, since collectives run in each;
    slots beyond a rank's samples hold zero-weight samples.
    """

    global_batch_size: int
    batch_ranks: int
    microbatches: int
    microbatch_size: int

    def share(self, batch_rank: int) -> range:
        """Positions within the global batch that are `batch_rank`'s: contiguous, sizes differing by one at most."""
        size, larger = divmod(self.global_batch_size, self.batch_ranks)
        start = batch_rank * size + min(batch_rank, larger)
        return range(start, start + size + (batch_rank < larger))


def plan_batch(global_batch_size: int, local_batch_size: int, batch_ranks: int) -> BatchPlan:
    """The fewest micro-batches of at most `local_batch_size` samples, and the smallest that then suffice."""
    most = -(-global_batch_size // batch_ranks)
    microbatches = -(-most // local_batch_size)
    return BatchPlan(global_batch_size, batch_ranks, microbatches, -(-most // microbatches))


def uses_float8(config: JobConfig) -> bool:
    return "quantize.linear.float8" in config.model.converters


def uses_grouped_float8(config: JobConfig) -> bool:
    return "quantize.grouped_mm.float8" in config.model.converters


def resolve(config: JobConfig, dp_shard: int, batch_ranks: int, dump_folder: str) -> JobConfig:
    """The config with every -1 and empty folder replaced by what it stands for."""
    training, schedule = config.training, config.lr_scheduler
    global_batch_size = training.global_batch_size
    if global_batch_size == -1:
        global_batch_size = training.local_batch_size * batch_ranks
    total_steps = training.steps if schedule.total_steps == -1 else schedule.total_steps
    return replace(
        config,
        job=replace(config.job, dump_folder=dump_folder),
        training=replace(training, global_batch_size=global_batch_size),
        parallelism=replace(config.parallelism, data_parallel_shard_degree=dp_shard),
        lr_scheduler=replace(schedule, total_steps=total_steps),
    )
