"""Peak memory of this process, and of those beside it."""

import resource

import torch
import torch.distributed as dist

_GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """Peak GiB so far: what the allocator reserved on an accelerator, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def peak_memory_by_rank(device: torch.device) -> list[float]:
    """As peak_memory_gib, of every rank; collective."""
    own = torch.tensor(peak_memory_gib(device), dtype=torch.float64, device=device)
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return [peak.item() for peak in every]
