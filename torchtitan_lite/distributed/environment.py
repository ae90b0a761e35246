"""What torchrun and the user put into the environment. No torch."""

import os
from pathlib import Path

from torchtitan_lite.errors import UserError

# Any of them speaks to torch's allocator of device memory; the first is what torch calls it now.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def count_from(variable: str, default: int, least: int = 1) -> int:
    """A whole number of at least `least` from the environment; `default` where the variable is unset or empty."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UserError(f"{variable}={text}: expected a whole number of at least {least}")
    return int(text)


def environment_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun has them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def set_allocator() -> None:
    """Have torch grow its segments of device memory in place, unless the user has told its allocator something.

    Gathers and loads of experts have another size each time, and would leave holes that nothing else fits in. To be
    called before torch first uses a device.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def accelerators() -> int:
    """Accelerators of this machine that are visible, counted without torch; 0 where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    nvidia = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()]
    amd = list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []
    return len(nvidia) or len(amd)
