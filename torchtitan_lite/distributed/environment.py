"""What torchrun and the user put into the environment. No torch."""

import os

from torchtitan_lite.errors import UserError


def count_from(variable: str, default: int) -> int:
    """A whole number of at least 1 from the environment; `default` where the variable is unset or empty."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise UserError(f"{variable}={text}: expected a whole number of at least 1")
    return int(text)


def environment_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun has them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
