"""Where the time of a traced step went, from the trace's own events: every instant is of one kind.

On CUDA by kernels and copies on the device; elsewhere by the operations of the host's threads and gloo's collectives.
What computes counts first, then what communicates, then what copies: communication is what no computation hides.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STEP = "torchtitan_lite: step "  # and the number: the name of the range that is looked at
KINDS = ("compute_s", "communication_exposed_s", "copies_s", "idle_s")

Event = Mapping[str, Any]
Interval = tuple[float, float]

# NCCL's kernels, and those of symmetric memory, which also copies between devices.
_KERNEL_SENDS = re.compile(r"nccl|nvshmem|symm_mem|multimem|one_shot_all_reduce|two_shot_all_reduce", re.IGNORECASE)
_OF_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_COLLECTIVE = re.compile(r"gloo:|c10d::|_c10d_functional::|record_param_comms")
# An operation has a namespace, as aten::mm; what else is recorded (nodes of autograd) waits and calls others too.
_COMPUTES = re.compile(r"(?!autograd::engine|torch::autograd)\w+::|Torch-Compiled Region|## Call CompiledFxGraph")


@dataclass
class _Found:
    """Intervals in microseconds, as they came."""

    compute: list[Interval] = field(default_factory=list)
    communication: list[Interval] = field(default_factory=list)
    copies: list[Interval] = field(default_factory=list)


def step_breakdown(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of a step by KINDS, which add up to it: the mean of the steps marked with STEP in a Chrome trace's events
    of one rank. Raises ValueError where none is marked."""
    marks = [each for each in events if _is(each, "user_annotation") and each["name"].startswith(STEP)]
    if not marks:
        raise ValueError("no step is marked in the trace")
    on_device = any(_is(each, *_OF_DEVICE) for each in events)
    found = _on_device(events) if on_device else _on_host(events, {each["tid"] for each in marks})
    compute = union(found.compute)
    communication = without(union(found.communication), compute)
    copies = without(without(union(found.copies), compute), communication)
    whole = [(each["ts"], each["ts"] + each["dur"]) for each in marks]
    parts = [sum(within(kind, step) for step in whole) for kind in (compute, communication, copies)]
    idle = sum(end - begin for begin, end in whole) - sum(parts)
    return {kind: part / len(marks) / 1e6 for kind, part in zip(KINDS, [*parts, idle], strict=True)}


def _on_device(events: Iterable[Event]) -> _Found:
    found = _Found()
    for event in events:
        if _is(event, "kernel"):
            sends = _KERNEL_SENDS.search(event["name"])
            (found.communication if sends else found.compute).append(_interval(event))
        elif _is(event, "gpu_memset"):
            found.compute.append(_interval(event))
        elif _is(event, "gpu_memcpy"):
            # Within a device a copy is work as any kernel's; between two it is sent.
            kind = "compute" if "DtoD" in event["name"] else "communication" if "PtoP" in event["name"] else "copies"
            getattr(found, kind).append(_interval(event))
    return found


def _on_host(events: Iterable[Event], loops: set[Any]) -> _Found:
    """loops: threads of the training loop. Others that run collectives copy for them and add for them."""
    computes: dict[Any, list[Interval]] = defaultdict(list)
    sends: dict[Any, list[Interval]] = defaultdict(list)
    for event in events:
        if not _is(event, "cpu_op", "user_annotation"):
            continue
        if _COLLECTIVE.match(event["name"]):
            sends[event["tid"]].append(_interval(event))
        elif _is(event, "cpu_op") and _COMPUTES.match(event["name"]):
            computes[event["tid"]].append(_interval(event))
    found = _Found(communication=[each for intervals in sends.values() for each in intervals])
    for thread, intervals in computes.items():
        if thread in sends and thread not in loops:
            found.communication += intervals
        else:
            # A product that holds a collective waits in it.
            found.compute += without(union(intervals), union(sends[thread]) if thread in sends else [])
    return found


def _is(event: Event, *categories: str) -> bool:
    return event.get("ph") == "X" and event.get("cat") in categories


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants in intervals that are apart and in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of `intervals` is in none of `others`; of both, and of the result, as union gives them."""
    left: list[Interval] = []
    index = 0
    for begin, end in intervals:
        while index < len(others) and others[index][1] <= begin:
            index += 1
        at = index
        while at < len(others) and others[at][0] < end:
            if others[at][0] > begin:
                left.append((begin, others[at][0]))
            begin = max(begin, others[at][1])
            at += 1
        if begin < end:
            left.append((begin, end))
    return left


def within(intervals: Iterable[Interval], whole: Interval) -> float:
    """How much of `whole` they cover, being apart."""
    return sum(max(0.0, min(end, whole[1]) - max(begin, whole[0])) for begin, end in intervals)
