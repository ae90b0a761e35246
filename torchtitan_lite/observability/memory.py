"""Peak memory of this process."""

import resource

import torch

_GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """Peak GiB so far: what the allocator reserved on an accelerator, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
