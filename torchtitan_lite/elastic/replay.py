"""Run a step's forward and backward twice and compare bits: hardware that computes wrong numbers does not say so."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtitan_lite.errors import Corruption

# Numbers are compared as integers of their size: a NaN equals itself, and 0.0 is not -0.0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Model(Protocol):
    parts: list[nn.Module]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def run_twice(
    model: Model, forward_backward: Callable[[], Tensor], device: torch.device, step: int, event: Callable[..., None]
) -> Tensor:
    """The loss of forward_backward(), which leaves gradients, after a second run on the same inputs gave the same bits.

    Holds the gradients of this rank's shards twice. What a forward writes into buffers (a mixture's counts) and what it
    draws from random generators count once. Raises Corruption on every rank, with the ranks that differ. Collective.
    """
    buffers = [(buffer, buffer.clone()) for part in model.parts for buffer in part.buffers()]
    with _digests_of_own_gradients(model.parts) as digests:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss = forward_backward()
        first, grads = list(digests), {name: parameter.grad for name, parameter in model.named_parameters()}
        digests.clear()
        for _, parameter in model.named_parameters():
            parameter.grad = None
        for buffer, value in buffers:
            buffer.copy_(value)
        again = forward_backward()
    pairs = [(name, grads[name], parameter.grad) for name, parameter in model.named_parameters()]
    found = {
        "host": socket.gethostname(),
        # Before anything is summed over ranks: these name the rank that computed them.
        "own": _first_difference((name, was, now) for (name, was), (_, now) in zip(first, digests, strict=True)),
        "summed": _first_difference([*pairs, ("the loss", loss, again)]),
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    if message := _verdict(step, everywhere):
        event("silent corruption", step, why=message)
        raise Corruption(message)
    return again


def _verdict(step: int, everywhere: Sequence[dict[str, Any]]) -> str:
    """What the ranks have found, in words; empty where all is the same."""
    for kind, when in (("own", "before ranks sum them"), ("summed", "after ranks have summed them")):
        differ = [
            f"rank {rank} on host {found['host']} ({found[kind]})"
            for rank, found in enumerate(everywhere)
            if found[kind]
        ]
        if differ:
            return (
                f"step {step} ran twice on the same inputs, and gradients differ, {when}, on {', '.join(differ)}; "
                "ranks that exchange activations with a faulty one differ too; take its host out and resume from the "
                "latest checkpoint"
            )
    return ""


def _first_difference(pairs: Iterable[tuple[str, Tensor | None, Tensor | None]]) -> str:
    """The name of the first tensor that is not twice the same; empty where all are."""
    names, counts = [], []
    for name, was, now in pairs:
        if was is not None and now is not None:
            names.append(name)
            counts.append((_bits(was) != _bits(now)).sum())
        elif was is not now:
            return f"{name}, a gradient in one run only"
    differ = torch.stack(counts).tolist() if counts else []
    return next((f"first {name}" for name, count in zip(names, differ, strict=True) if count), "")


@contextmanager
def _digests_of_own_gradients(parts: Sequence[nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """A list that each gradient joins as this rank computes it: (parameter, sum of its bits as an int64 scalar)."""
    digests: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda grad: digests.append((name, _bits(grad).sum(dtype=torch.int64)))

    handles = []
    for part in parts:
        names = {parameter: name for name, parameter in part.named_parameters()}
        for module in part.modules():
            if not isinstance(module, FSDPModule):
                continue
            # Of one unit at a time: FSDP differentiates a whole parameter, the same object in every step, and keeps
            # its gradient to itself.
            module.unshard()
            whole = {parameter: name for name, parameter in part.named_parameters() if parameter not in names}
            handles += [parameter.register_hook(note(name)) for parameter, name in whole.items()]
            names = {parameter: name for parameter, name in names.items() if name not in whole.values()}
            module.reshard()
        handles += [parameter.register_hook(note(name)) for parameter, name in names.items()]
    try:
        yield digests
    finally:
        for handle in handles:
            handle.remove()


def _bits(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(_BITS[local.element_size()])
