"""How many nodes a run may have, and how their launchers meet. No torch."""

import os
from dataclasses import dataclass

from torchtitan_lite.distributed.environment import count_from
from torchtitan_lite.errors import UserError

# A lost node is noticed after three of these at most, and a world forms when no other node has come for `last_call`.
# torch's own values are 5 s, three attempts and 30 s.
_WHEN_NODES_COME_AND_GO = "keep_alive_interval=3,keep_alive_max_attempt=3,last_call_timeout=10"


@dataclass(frozen=True)
class Nodes:
    """Numbers of nodes that a run may have; the same for a number that is fixed."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"

    @property
    def fixed(self) -> bool:
        return self.least == self.most


def nodes_from_environment() -> Nodes:
    """NNODES: a number or MIN:MAX, 1 where it is unset. Raises UserError."""
    text = os.environ.get("NNODES") or "1"
    least, colon, most = text.partition(":")
    ends = [least, most if colon else least]
    if not all(end.isascii() and end.isdecimal() for end in ends) or not 1 <= int(ends[0]) <= int(ends[1]):
        raise UserError(f"NNODES={text}: expected a whole number of at least 1, or MIN:MAX as in 2:4")
    return Nodes(int(ends[0]), int(ends[1]))


def restarts_from_environment(nodes: Nodes) -> int:
    """MAX_RESTARTS: failures after which a node's ranks are started again; 0, or 3 where nodes come and go."""
    return count_from("MAX_RESTARTS", 0 if nodes.fixed else 3, least=0)


def rendezvous_arguments(nodes: Nodes) -> list[str]:
    """torchrun's arguments by RDZV_ENDPOINT, RDZV_ID and RDZV_CONF. Raises UserError."""
    endpoint = os.environ.get("RDZV_ENDPOINT", "")
    if nodes.most == 1 and not endpoint:
        return ["--standalone"]  # a free port of this machine
    if not endpoint:
        raise UserError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT, the same on every node")
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: expected HOST:PORT, as in node0:29500")
    settings = [] if nodes.fixed else [_WHEN_NODES_COME_AND_GO]
    if own := os.environ.get("RDZV_CONF"):
        if not all(key.strip() and value for key, _, value in (entry.partition("=") for entry in own.split(","))):
            raise UserError(f"RDZV_CONF={own}: expected KEY=VALUE,KEY=VALUE, as in join_timeout=1200")
        settings.append(own)  # of a key that is there twice torchrun takes the last
    arguments = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={rendezvous_id()}"]
    return arguments + ([f"--rdzv-conf={','.join(settings)}"] if settings else [])


def rendezvous_id() -> str:
    """RDZV_ID: what tells a job from others at the same endpoint."""
    return os.environ.get("RDZV_ID") or "torchtitan_lite"
