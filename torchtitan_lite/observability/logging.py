"""Log lines of the ranks that a user wants to hear."""

import logging
import os
import sys
from typing import TextIO

from torchtitan_lite.errors import UserError


def shown_ranks(world_size: int) -> list[int]:
    """The ranks named in LOG_RANK, as in 0,3; rank 0 by default. Raises UserError for one that is not there."""
    text = os.environ.get("LOG_RANK") or "0"
    ranks = text.split(",")
    if not all(rank.isdecimal() and int(rank) < world_size for rank in ranks):
        raise UserError(f"LOG_RANK={text}: expected ranks below {world_size} separated by commas, as in 0,3")
    return [int(rank) for rank in ranks]


def setup_logging(stream: TextIO | None = None, shown: bool = True) -> None:
    """Send this package's log to `stream` (stdout by default): everything where it is shown, else errors only."""
    handler = logging.StreamHandler(stream or sys.stdout)
    # Ranks are told apart where the user asked for several.
    who = f"[rank {os.environ['RANK']}] " if "," in os.environ.get("LOG_RANK", "") and "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("torchtitan_lite")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if shown else logging.ERROR)
