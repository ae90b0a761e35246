"""Bytes that this rank has sent in collectives, from what torch's flight recorder keeps of them."""

import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch.distributed as dist

from torchtitan_lite.distributed.runtime import recorded_collectives

_GIB = 1 << 30
# What a rank sends in a ring or pairwise algorithm over n ranks, by the bytes of its input.
_SENT: dict[str, Callable[[int], float]] = {
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda _: 1.0,
}
# Longer names of NCCL and gloo hold these, in this order of search.
_KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "alltoall": "all_to_all",
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
    "send": "send",
}
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "BFloat16": 2, "Half": 2, "Short": 2}


def sent_since(began_ns: int) -> dict[str, Any] | None:
    """What this rank has sent in collectives that began at `began_ns` (of time.time_ns) or later: {"sent_gib",
    "by_kind"}; None where the recorder is off (comm.trace_buf_size = 0).

    gloo's recorder leaves out what pipeline stages send to each other.
    """
    entries = _entries()
    if entries is None:
        return None
    groups = {str(name): group.size() for group, name in dist.distributed_c10d._world.pg_names.items()}
    return summed((each for each in entries if each["time_created_ns"] >= began_ns), groups)


def summed(entries: Iterable[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """As sent_since. ranks: of each group, by its name."""
    by_kind: dict[str, float] = defaultdict(float)
    for entry in entries:
        name = str(entry["profiling_name"]).lower()
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is not None:
            sizes = zip(entry["input_sizes"], entry["input_dtypes"], strict=False)
            given = sum(prod(shape) * _BYTES.get(dtype, 1) for shape, dtype in sizes)
            by_kind[kind] += given * _SENT[kind](ranks[str(entry["process_group"][0])]) / _GIB
    return {"sent_gib": sum(by_kind.values()), "by_kind": {kind: value for kind, value in by_kind.items() if value}}


def _entries() -> list[dict[str, Any]] | None:
    recorded = recorded_collectives()
    if recorded is None:
        return None
    found = json.loads(recorded) if dist.get_backend() == "gloo" else pickle.loads(recorded)
    return list(found.get("entries", []))
