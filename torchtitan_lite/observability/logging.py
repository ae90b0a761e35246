"""Log lines of the ranks that a user wants to hear."""

import logging
import os
import sys
from typing import TextIO

from torchtitan_lite.errors import UserError


def shown_ranks() -> list[int]:
    """The ranks named in LOG_RANK, as in 0,3; rank 0 by default."""
    text = os.environ.get("LOG_RANK", "0")
    try:
        return [int(rank) for rank in text.split(",")]
    except ValueError:
        raise UserError(f"LOG_RANK={text}: expected ranks separated by commas, as in 0,3") from None


def setup_logging(stream: TextIO | None = None, rank: int = 0) -> None:
    """Send this package's log to `stream` (stdout by default): everything on shown ranks, errors on the others."""
    handler = logging.StreamHandler(stream or sys.stdout)
    who = f"[rank {rank}] " if os.environ.get("LOG_RANK") else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("torchtitan_lite")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if rank in shown_ranks() else logging.ERROR)
