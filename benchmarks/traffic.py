"""Bytes that this rank sends in collectives, counted where they are called.

What a rank sends in a ring or pairwise algorithm over n ranks, W the bytes of the whole tensor (the gathered, the not
yet scattered one): all-gather, reduce-scatter and all-to-all (n-1)/n W, all-reduce 2 (n-1)/n W; send W. An all-to-all
of uneven rows: those that are not its own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Op: (kind, its whole tensors from arguments and result).
_Rule = tuple[str, Callable[[Sequence[Any], Any], list[Tensor]]]
_OPS: dict[str, _Rule] = {
    "c10d::_allgather_base_": ("all-gather", lambda args, _: [args[0]]),
    "c10d::allgather_": ("all-gather", lambda args, _: list(args[0][0])),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", lambda args, _: [args[1]]),
    "c10d::allreduce_": ("all-reduce", lambda args, _: list(args[0])),
    "c10d::alltoall_base_": ("all-to-all", lambda args, _: [args[1]]),
    "c10d::send": ("send", lambda args, _: list(args[0])),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", lambda _, out: [out]),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", lambda args, _: [args[0]]),
    "_c10d_functional::all_reduce": ("all-reduce", lambda args, _: [args[0]]),
    "_c10d_functional::all_reduce_": ("all-reduce", lambda args, _: [args[0]]),
    "_c10d_functional::all_to_all_single": ("all-to-all", lambda args, _: [args[0]]),
}
_SENDS_NOTHING = {"c10d::recv_", "c10d::barrier", "_c10d_functional::wait_tensor"}
_SENDS_NOTHING |= {"_c10d_functional::_wrap_tensor_autograd"}
_SHARE: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "send": lambda _: 1.0,
}


@dataclass(frozen=True)
class Call:
    """One collective. functional: called by the model itself, by an op that returns what it received; FSDP, the
    pipeline and scalars use the others. numbers: elements of its whole tensors. site: what called it."""

    kind: str
    functional: bool
    ranks: int
    shape: tuple[int, ...]
    numbers: int
    sent: float
    site: str


class Traffic(TorchDispatchMode):
    """Keeps every collective over more than one rank that runs within it, backwards included: on a CPU they run on
    the thread that called them. Raises NotImplementedError for one that it cannot count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # DTensor first: what it communicates comes back here as plain collectives.
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        space = name.split("::")[0]
        if space in ("c10d", "_c10d_functional") and name not in _SENDS_NOTHING:
            if name not in _OPS:
                raise NotImplementedError(f"{name}: no rule for the bytes that it sends")
            self._count(name, space, args, out)
        return out

    def _count(self, name: str, space: str, args: Sequence[Any], out: Any) -> None:
        kind, whole = _OPS[name]
        tensors, ranks = whole(args, out), _group_of(args).size()
        if ranks > 1:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            share = _SHARE[kind](ranks)
            if name == "_c10d_functional::all_to_all_single":
                own, rows = args[2][_group_of(args).rank()], sum(args[2])
                share = 1 - own / rows if rows else 0.0
            self.calls.append(
                Call(
                    kind,
                    space == "_c10d_functional",
                    ranks,
                    tuple(tensors[0].shape),
                    sum(tensor.numel() for tensor in tensors),
                    size * share,
                    _call_site(),
                )
            )


def _group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    for arg in reversed(args):
        if isinstance(arg, dist.ProcessGroup):
            return arg
        if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup":
            return dist.ProcessGroup.unbox(arg)
    # Functional ops may name it instead, after everything else.
    return dist.distributed_c10d._resolve_process_group(args[-1])


_PLUMBING = (
    __file__,
    "torch/_ops.py",
    "torch/utils/",
    "distributed_c10d.py",
    "c10d_logger.py",
    "_functional_collectives",
)
_PLUMBING += (
    "torch/_compile.py",
    "torch/_dynamo/",
    "torch/_library/",
    "typing_extensions.py",
    "torch/_tensor.py",
    "torch/autograd/",
    "contextlib.py",
)


def _call_site() -> str:
    """The innermost frame outside torch's layers over collectives, and the innermost of the package's own."""
    inner, own = "", ""
    frame = sys._getframe(1)
    while frame is not None and not own:
        path, where = frame.f_code.co_filename, f"{frame.f_code.co_name}:{frame.f_lineno}"
        if not inner and not any(part in path for part in _PLUMBING):
            inner = f"{'/'.join(path.split('/')[-2:])}:{where}"
        if "/torchtitan_lite/" in path:
            own = f"{path.rsplit('/torchtitan_lite/', 1)[1]}:{where}"
        frame = frame.f_back
    return inner if own.split("/")[-1] == inner.split("/")[-1] else f"{inner} < {own}"
