"""Degrees of parallelism as pure arithmetic: which axes the mesh has, how long each is. No torch."""

from dataclasses import dataclass
from math import gcd, prod

from torchtitan_lite.config.schema import Parallelism
from torchtitan_lite.errors import UserError

# Mesh axes from the outermost (slowest links) to the innermost (fastest links).
AXES = {
    "pp": "ranks that each hold some of the layers (pipeline_parallel_degree)",
    "dp_replicate": "copies of the model (data_parallel_replicate_degree)",
    "dp_shard": "ranks over which parameters are sharded (data_parallel_shard_degree)",
    "cp": "ranks that share each sequence (context_parallel_degree)",
    "tp": "ranks that share each matrix product (tensor_parallel_degree)",
}


@dataclass(frozen=True)
class ParallelDims:
    """The degree of every axis; `ep` shares ranks with the others and is no axis of its own: what it must divide also
    depends on the model (see mesh_rules).

    Ranks are laid out row-major over AXES: neighbours in rank differ in `tp` first.
    """

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis, degree in self.degrees.items():
            if degree < 1:
                raise UserError(f"degree of {axis} is {degree}: must be at least 1")

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> "ParallelDims":
        """Degrees for `world_size` ranks, data_parallel_shard_degree = -1 filled in.

        Raises UserError where the degrees do not fit the world size, with world sizes that would.
        """
        degrees = _asked_for(parallelism)
        if degrees["dp_shard"] == -1:
            others = prod(degree for axis, degree in degrees.items() if axis != "dp_shard")
            if world_size % others:
                raise UserError(
                    f"{world_size} ranks cannot be shared out: {_product(degrees, skip='dp_shard')} = {others} does "
                    f"not divide it; use a multiple of {others} ranks or lower a degree"
                )
            degrees["dp_shard"] = world_size // others
        if (needed := prod(degrees.values())) != world_size:
            raise UserError(
                f"parallelism asks for {_product(degrees)} = {needed} ranks, there are {world_size}; use {needed} "
                "ranks or set parallelism.data_parallel_shard_degree = -1 to take what is left"
            )
        return cls(**degrees, ep=parallelism.expert_parallel_degree)

    @property
    def degrees(self) -> dict[str, int]:
        """Degree of each mesh axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return prod(self.degrees.values())

    @property
    def batch_ranks(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def batch_rank(self, rank: int) -> int:
        """The index of `rank` among the ranks that read different samples."""
        return rank // (self.cp * self.tp) % self.batch_ranks

    def first_peer(self, rank: int) -> int:
        """The first of the ranks that hold the same layers as `rank`: the outermost axis tells them apart."""
        stage = self.world_size // self.pp
        return rank // stage * stage

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        place = {}
        for axis, degree in reversed(self.degrees.items()):
            rank, place[axis] = divmod(rank, degree)
        return place

    def __str__(self) -> str:
        """`4 ranks: dp_replicate 2 x dp_shard 2, ep 2 within`"""
        longer = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        within = f", ep {self.ep} within" if self.ep > 1 else ""
        return f"{self.world_size} ranks: {' x '.join(longer)}{within}" if longer else "1 rank"


def fewest_ranks(parallelism: Parallelism) -> int:
    """The smallest world size that the degrees allow; -1 counts as what experts need at least."""
    degrees = _asked_for(parallelism)
    if degrees["dp_shard"] == -1:
        degrees["dp_shard"] = parallelism.expert_parallel_degree // gcd(
            parallelism.expert_parallel_degree, parallelism.context_parallel_degree
        )
    return prod(degrees.values())


def _asked_for(parallelism: Parallelism) -> dict[str, int]:
    return {
        "pp": parallelism.pipeline_parallel_degree,
        "dp_replicate": parallelism.data_parallel_replicate_degree,
        "dp_shard": parallelism.data_parallel_shard_degree,
        "cp": parallelism.context_parallel_degree,
        "tp": parallelism.tensor_parallel_degree,
    }


def _product(degrees: dict[str, int], skip: str = "") -> str:
    return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if axis != skip)


def divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
