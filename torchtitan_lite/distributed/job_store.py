"""The store that a start's ranks meet in, free of what an earlier start left there."""

import json
import os
import time
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.05


def connect(timeout: timedelta, *, host: bool = False) -> dist.TCPStore:
    """A connection of its own to the job's store, of which torchrun tells. host: be the one that runs it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=host, timeout=timeout, wait_for_workers=False, multi_tenant=True)


def fresh_store(rank: int, ranks: int, timeout: timedelta) -> dist.Store:
    """The part of the job's store that belongs to this start alone. Collective.

    torchrun (torch 2.13) keeps one store for all its starts, and its variables do not tell them apart on every node: a
    rank that is quick to start again finds the addresses of ranks that have ended. So the first rank names the start
    once each rank has said that it is there, and all have seen the name.
    """
    store = connect(timeout, host=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    own = os.urandom(8).hex()
    store.set(f"here/{rank}", own)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        name = _name(store, ranks) if rank == 0 else _named(store, rank, own)
        if name:
            return dist.PrefixStore(f"start-{name}", store)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank}: not all {ranks} ranks came within {timeout.total_seconds():.0f} s")
        time.sleep(_POLL_S)


def _name(store: dist.Store, ranks: int) -> str:
    """The first rank's part: a name that every rank has seen; "" where one was an earlier start's."""
    keys = [f"here/{rank}" for rank in range(ranks)]
    here, name = store.multi_get(keys), os.urandom(8).hex()
    store.set("start", json.dumps([name, [each.decode() for each in here]]))
    seen = [f"seen/{name}/{rank}" for rank in range(1, ranks)]
    while seen and not store.check(seen):
        if store.multi_get(keys) != here:
            return ""
        time.sleep(_POLL_S)
    store.set(f"go/{name}", "yes")
    return name


def _named(store: dist.Store, rank: int, own: str) -> str:
    """The name of the start that this rank is a part of; "" where there is none yet."""
    name, here = json.loads(store.get("start"))
    if rank >= len(here) or here[rank] != own:
        return ""
    store.set(f"seen/{name}/{rank}", "yes")
    return name if store.check([f"go/{name}"]) else ""
