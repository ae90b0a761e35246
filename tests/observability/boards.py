"""TensorBoard's own readers and server, on what a run has left."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_EVERYTHING = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance=_EVERYTHING)
    accumulator.Reload()
    return accumulator


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag to (step, value) in order."""
    found = read(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def histograms(folder: Path) -> dict[str, dict[int, dict[float, float]]]:
    """tag to step to the upper edges of buckets that hold something and their counts."""
    found = read(folder)
    return {
        tag: {
            event.step: {
                limit: count
                for limit, count in zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True)
                if count
            }
            for event in found.Histograms(tag)
        }
        for tag in found.Tags()["histograms"]
    }


class Served:
    """A TensorBoard that is up. url: with a slash at its end."""

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("/") else f"{url}/"

    def get(self, path: str, body: Any = None, **query: str) -> Any:
        """The answer to a GET; with a body, to a POST of it as JSON."""
        address = f"{self.url}data/{path}" + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)


@contextmanager
def served(logdir: Path, load_fast: str) -> Iterator[Served]:
    """TensorBoard in this process. load_fast: "true" for the reader in Rust, "false" for the one in Python."""
    from tensorboard import default, program

    board = program.TensorBoard(default.get_plugins())
    board.configure(
        argv=["tensorboard", f"--logdir={logdir}", "--port=0", "--host=127.0.0.1", f"--load_fast={load_fast}"]
    )
    yield Served(board.launch())
