"""Bytes that a rank has sent, from the flight recorder's entries."""

from typing import Any

import pytest

from torchtitan_lite.distributed.sent import summed

_GIB = 1 << 30


def entry(name: str, shape: list[int], dtype: str = "Float", group: str = "0") -> dict[str, Any]:
    return {
        "profiling_name": name,
        "input_sizes": [shape],
        "input_dtypes": [dtype],
        "process_group": [group, "default_pg"],
    }


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("gloo:all_gather", "Float", 400 * 3),
        ("nccl:_all_gather_base", "BFloat16", 200 * 3),
        ("nccl:_reduce_scatter_base", "Float", 400 * 3 / 4),
        ("gloo:all_reduce", "Double", 800 * 2 * 3 / 4),
        ("nccl:all_to_all", "Float", 400 * 3 / 4),
        ("nccl:send 0->1", "Float", 400),
        ("nccl:recv 0<-1", "Float", 0),
        ("gloo:barrier", "Float", 0),
        ("nccl:_all_gather_base", "Float8_e4m3fn", 100 * 3),
    ],
)
def test_what_each_collective_sends(name: str, dtype: str, expected: float) -> None:
    assert summed([entry(name, [10, 10], dtype)], {"0": 4})["sent_gib"] * _GIB == pytest.approx(expected)


def test_groups_count_by_their_own_size_and_kinds_apart() -> None:
    entries = [entry("gloo:all_gather", [4], group="7"), entry("gloo:all_gather", [4]), entry("gloo:all_reduce", [2])]
    found = summed(entries, {"0": 2, "7": 5})
    assert found["by_kind"] == pytest.approx({"all_gather": 16 * (4 + 1) / _GIB, "all_reduce": 8 / _GIB})
    assert found["sent_gib"] == pytest.approx(88 / _GIB)


def test_one_rank_sends_nothing() -> None:
    assert summed([entry("gloo:all_reduce", [2])], {"0": 1}) == {"sent_gib": 0.0, "by_kind": {}}
