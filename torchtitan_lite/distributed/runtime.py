"""This process among the others: device, process group, time-outs, threads, seeds."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from torchtitan_lite.config.schema import Comm, Debug
from torchtitan_lite.distributed.environment import cores, count_from, environment_ranks
from torchtitan_lite.distributed.job_store import fresh_store
from torchtitan_lite.errors import UserError

_SLOWEST_DISK = timedelta(hours=1)
# Collectives wait so much longer than the watchdog, which says more of a hang than the error that they raise.
AFTER_THE_WATCHDOG_S = 15
_HOPPER_AND_BLACKWELL = ((9, 0), (10, 0))  # compute capabilities on which cuDNN's attention is the fastest
_CUDNN_OF_ALL_LENGTHS = 91501
RECORDED = "collectives_rank_"  # and the rank: what the flight recorder has


@dataclass(frozen=True)
class Runtime:
    """rank, world_size: of this process. device: the one it computes on. device_name: as its vendor calls it."""

    rank: int
    world_size: int
    device: torch.device
    device_name: str


def start(comm: Comm, debug: Debug) -> Runtime:
    """Choose the device, join the process group, set threads and seeds."""
    rank, world_size = environment_ranks()
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    _make_deterministic(debug, device)
    torch.set_num_threads(count_from("OMP_NUM_THREADS", cores()))
    timeout = timedelta(seconds=comm.init_timeout_seconds + AFTER_THE_WATCHDOG_S)
    store = fresh_store(rank, world_size, timeout) if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Runtime(rank, world_size, device, name)


def prefer_cudnn_attention(device: torch.device, seq_len: int, cp: int) -> None:
    """Have attention try cuDNN first on Hopper and Blackwell, also with the cuDNN of CUDA 12's wheels, which torch by
    itself passes over: before 9.15.1 it is wrong where a sequence is no multiple of 128 (pytorch/pytorch#169849).

    cp: ranks that share a sequence; attention may then see two pieces of it for each.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in _HOPPER_AND_BLACKWELL:
        return
    if "TORCH_CUDNN_SDPA_DEPRIORITIZED" in os.environ:  # torch's own switch
        return
    version = torch.backends.cudnn.version()
    if version is not None and (version >= _CUDNN_OF_ALL_LENGTHS or seq_len % (128 * (2 * cp if cp > 1 else 1)) == 0):
        cudnn = int(SDPBackend.CUDNN_ATTENTION)  # type: ignore[call-overload]
        order = torch._C._get_sdp_priority_order()
        torch._C._set_sdp_priority_order([cudnn, *(each for each in order if each != cudnn)])


def settle(device: torch.device) -> None:
    """Wait for the device, where what it has yet to do is to count as a step's time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record_collectives(comm: Comm, folder: Path) -> None:
    """Have torch's flight recorder keep the last collectives, from the next process group on."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    # NCCL finds by itself a collective that hangs on the device while the host goes on.
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = str(int(comm.trace_buf_size > 0))
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / RECORDED)


def recorded_collectives() -> bytes | None:
    """What the flight recorder keeps: with NCCL as torchfrtrace reads it, with gloo as JSON; None where it is off."""
    if os.environ.get("TORCH_FR_BUFFER_SIZE", "0") == "0":
        return None
    # torchfrtrace cannot read what gloo leaves (torch 2.13): it names no process groups.
    name = "_dump_fr_trace_json" if dist.get_backend() == "gloo" else "_dump_nccl_trace"
    return bytes(getattr(torch._C._distributed_c10d, name)())


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks on hosts, for those who wait until the slowest has written; collective.

    Each thread needs its own: what two of them do on one group may come in another order on another rank.
    """
    group: dist.ProcessGroup = dist.new_group(timeout=_SLOWEST_DISK, backend="gloo")
    return group


def tighten_timeouts(seconds: int, patient: Collection[dist.ProcessGroup | None]) -> None:
    """Set the time-out of all process groups but these: after the first step nothing waits for a compiler any more."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if not any(group is each for each in patient):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def from_first_rank(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first rank's value, on every rank; collective. group: of all ranks, where another is to wait."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=group)
    return shared[0]


def same_on_all_ranks(value: Any) -> bool:
    """Whether every rank has this one's value; collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return all(other == value for other in every)


def is_restart() -> bool:
    """Whether torchrun has started any rank before in this launch; the same on every rank, collective.

    The counts are the agents' own, and agents that joined later have lower ones.
    """
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return count.item() > 0


def require_equal_on_all_ranks(settings: dict[str, Any]) -> None:
    """Raise UserError on every rank where one has another value of a setting; collective.

    Nodes with other files or environments would train on different things, or hang.
    """
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, settings)
    for key, value in every[0].items():
        for rank, others in enumerate(every):
            if (other := others.get(key, "no such setting")) != value:
                raise UserError(f"{key} differs between ranks: rank 0 has {value}, rank {rank} has {other}")


def stop() -> None:
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} here; lower NPROC")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    # gloo beside NCCL: checkpoints gather objects through CPU tensors.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _make_deterministic(debug: Debug, device: torch.device) -> None:
    torch.manual_seed(debug.seed)
    torch.autograd.set_detect_anomaly(debug.detect_anomaly)
    if debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = False
