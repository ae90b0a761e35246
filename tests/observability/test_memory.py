"""Peaks of ranks."""

from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.ranks import RankPool
from torchtitan_lite.observability.memory import peak_memory_by_rank


def _peaks() -> list[float]:
    own = 0.5 + dist.get_rank() / 4
    with patch("torchtitan_lite.observability.memory.peak_memory_gib", return_value=own):
        return peak_memory_by_rank(torch.device("cpu"))


def test_each_rank_knows_the_peaks_of_all_in_their_order(pool: RankPool) -> None:
    assert pool.run(_peaks, 2) == [[0.5, 0.75]] * 2
