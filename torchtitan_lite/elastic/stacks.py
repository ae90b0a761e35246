"""Where a thread is in the code, and which collective it waits in, read from its stack."""

import sys
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

import torchtitan_lite

_PACKAGE = str(Path(torchtitan_lite.__file__).parent) + "/"
_INSTALLED = (
    *(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    f"{Path(torch.__file__).parent}/",
)
_COLLECTIVES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")
# What waits in torch without a call of a collective on the stack: (module, part of the function's name, in words).
_WAITS = (
    ("torch.distributed.fsdp", "unshard", "FSDP's all_gather of parameters"),
    ("torch.distributed.fsdp", "foreach_all_gather", "FSDP's all_gather of parameters"),
    ("torch.distributed.fsdp", "reduce", "FSDP's reduction of gradients"),
    ("torch.distributed.fsdp", "finalize_backward", "FSDP's reduction of gradients"),
    ("torch.distributed.pipelining", "_wait_batch_p2p", "the exchange between pipeline stages"),
    ("torch.distributed.pipelining", "_batch_p2p", "the exchange between pipeline stages"),
)


def located(innermost: FrameType | None) -> tuple[str, str]:
    """(function, file:line) of the project's code in a stack, and the collective it waits in; "" for none."""
    within: list[FrameType] = []
    frame = innermost
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        within.append(frame)
        frame = frame.f_back
    if frame is None:
        return "", _collective(within)
    code = frame.f_code
    return f"{code.co_name}, {_shown(code.co_filename)}:{frame.f_lineno}", _collective(within)


def all_stacks(first: int) -> str:
    """Every thread's stack, that of thread id `first` first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    blocks = [f"{names.get(ident, 'thread')} ({ident})\n{''.join(traceback.format_stack(f))}" for ident, f in frames]
    return "\n".join(blocks)


def _is_ours(file: str) -> bool:
    """Of this package, or of a model from outside: of what is neither installed nor generated."""
    return file.startswith(_PACKAGE) or not (file.startswith(_INSTALLED) or file.startswith("<"))


def _shown(file: str) -> str:
    for root in (str(Path(_PACKAGE).parent), str(Path.cwd())):
        if file.startswith(f"{root}/"):
            return file[len(root) + 1 :]
    return file


def _collective(within: Sequence[FrameType]) -> str:
    """The outermost of these frames, innermost first, that is one."""
    for frame in reversed(within):
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if module in _COLLECTIVES and not name.startswith("_"):
            return name
        if module == "torch._ops" and "c10d" in (op := str(frame.f_locals.get("self", ""))):
            return op
        for package, part, words in _WAITS:
            if module.startswith(package) and part in name:
                return words
    return ""
