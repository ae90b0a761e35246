"""Two hosts as network namespaces of this machine, and a third for the rendezvous; the cable of one is pulled."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.kills import Tally, compared, recipe_of, wait_until
from tests.chaos.launched import ROOT, launch
from tests.checkpoint.reading import last_lines
from tests.ranks import RankPool
from tests.test_trainer import _run as train
from torchtitan_lite.observability.sinks import read_lines

_BRIDGE, _TIMEOUT_S = "chaos0", 180
_STEP_TIMEOUT_S = 15  # a cable that is pulled says nothing: only time tells
_HOSTS = {"chaos-a": "10.77.0.1", "chaos-b": "10.77.0.2", "chaos-store": "10.77.0.9"}


class CannotNetwork(Exception):
    """This user may not make network namespaces here."""


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotNetwork("there is no ip command") from None
    if done.returncode != 0:
        raise CannotNetwork(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def hosts() -> Iterator[None]:
    """Three namespaces on one bridge. Raises CannotNetwork."""
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        for number, (host, address) in enumerate(_HOSTS.items()):
            _ip("netns", "add", host)
            _ip("link", "add", f"cable{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("link", "set", f"cable{number}", "master", _BRIDGE, "up")
            for device in ("lo", "eth0"):
                _ip("-n", host, "link", "set", device, "up")
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        yield
    finally:
        for number, host in enumerate(_HOSTS):
            subprocess.run(["ip", "link", "delete", f"cable{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
        subprocess.run(["ip", "link", "delete", _BRIDGE], capture_output=True)


def _node(host: str, recipe: Path, folder: Path) -> "subprocess.Popen[bytes]":
    address = _HOSTS[host]
    return launch(
        recipe,
        folder,
        f"--comm.train_timeout_seconds={_STEP_TIMEOUT_S}",
        log=folder.with_name(f"{host}.log"),
        around=["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {address}; exec "$@"', "sh"],
        NPROC="1",
        NNODES="1:2",
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="eth0",
        RDZV_ENDPOINT=f"{_HOSTS['chaos-store']}:29400",
    )


def _worlds(folder: Path) -> list[int]:
    return [line["world_size"] for line in read_lines(folder / "events.jsonl") if line["event"] == "start"]


def rows(pool: RankPool, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The table's row of a run that loses one of two hosts to a cable that is pulled."""
    what = "cable of one of two hosts (network namespaces) pulled"
    try:
        with hosts():
            tally, seconds = _cut(pool, folder)
    except CannotNetwork as reason:
        return [{"what": what, "times": 0, "outcome": f"not run: {reason}", "faults": []}]
    after = f"{seconds.get('formed', 0):.0f} s after (comm.train_timeout_seconds = {_STEP_TIMEOUT_S})"
    outcome = (
        f"the other forms anew {after}, {tally.repeated_steps} steps run twice; it ends with the undisturbed run's "
        "losses and samples"
    )
    return [{"what": what, "times": 1, "outcome": outcome, "faults": tally.faults, **seconds}]


def _cut(pool: RankPool, folder: Path) -> tuple[Tally, dict[str, float]]:
    recipe, run, seconds = recipe_of(folder, 80, model="tests.integration.slow_model:SPEC"), folder / "run", {}
    train(pool, 1, recipe, folder / "undisturbed")
    store = subprocess.Popen(
        ["ip", "netns", "exec", "chaos-store", sys.executable, "-m", "torchtitan_lite", "rendezvous"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    nodes = [_node(host, recipe, run) for host in ("chaos-a", "chaos-b")]
    tally = Tally(kills=1)
    try:
        if not wait_until(lambda: len(last_lines(run / "metrics.jsonl")) >= 6, _TIMEOUT_S):
            tally.faults.append("two hosts did not begin")
            return tally, seconds
        _ip("link", "set", "cable1", "down")
        cut = time.monotonic()
        if not wait_until(lambda: _worlds(run)[1:] == [1], _TIMEOUT_S):
            tally.faults.append("the host that is left did not form anew")
            return tally, seconds
        seconds["formed"] = time.monotonic() - cut
        if (code := nodes[0].wait(_TIMEOUT_S)) != 0:
            tally.faults.append(f"the host that is left ended with {code}")
        return compared(tally, run, folder / "undisturbed"), seconds
    finally:
        for process in (*nodes, store):
            process.kill()
            process.wait()
