"""TensorBoard: what a run's records, events and histograms become there. One process writes.

A thread of its own does it: importing the writer would delay the second step. Nothing of tensorboard is imported
before a board is opened, and all of a run lands in one folder, so that TensorBoard takes it for one run.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_lite.observability.bar import COLOURS, stacked_bar

if TYPE_CHECKING:
    from torchtitan_lite.observability.histograms import Counted

# Of a record's keys, under TorchTitan's tags where it has the number too.
_TAGS = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tokens_seen": "n_tokens_seen",
    "step_time_s": "time_metrics/end_to_end(s)",
    "data_time_s": "time_metrics/data_loading(s)",
    "tps": "throughput(tps)",
    "tflops": "tflops",
    "moe_aux_loss": "moe/aux_loss",
    "moe_z_loss": "moe/z_loss",
    "moe_entropy": "moe/entropy",
    "moe_largest_share": "moe/largest_share",
    "moe_dropped": "moe/dropped",
}
_SHARES = {"mfu": "mfu(%)", "mfu_float8": "mfu_float8(%)"}
_MEMORY = {"cuda": "memory/max_reserved(GiB)", "cpu": "memory/max_resident(GiB)"}  # what peak_memory_gib measures
_VALIDATION = "validation_metrics/loss"
_NO_CURVES = ("step", "attempt")

# What the table has the median of; in one group with its curve, for a single point is no sight to begin with.
_FINAL = {tag: f"{tag}/median" for tag in (_TAGS["tps"], _SHARES["mfu"])}

# Columns of the table of recipes: the last value of each tag, and its heading.
_COLUMNS = {
    _TAGS["loss"]: "loss",
    _VALIDATION: "validation loss",
    _FINAL["throughput(tps)"]: "tps, median",
    _FINAL["mfu(%)"]: "mfu(%), median",
    _MEMORY["cuda"]: "memory reserved (GiB)",
    _MEMORY["cpu"]: "memory resident (GiB)",
}
_RECENT = 50  # records that medians are of

# Read before all others, which have the time in this place. Readers keep what they read first of a session, so that a
# start with other settings must replace the file.
_SESSION_FILE = "events.out.tfevents.0000000000.session"


@dataclass(frozen=True)
class Setting:
    """A column of the table of recipes. key: as in recipes. heading: shorter. first: whether it is to stand before the
    others, which TensorBoard sorts by key and hides after the fifth."""

    key: str
    heading: str
    value: bool | float | str
    first: bool = False


@dataclass(frozen=True)
class About:
    """What a run is. text: Markdown. device: "cuda" or "cpu"."""

    settings: tuple[Setting, ...]
    text: str
    device: str


class TensorBoard:
    """Writes a run's events into `folder`; readers drop what an earlier attempt wrote at `first_step` or later.

    What fails in the thread is raised by a later call or by `close`.
    """

    def __init__(self, folder: Path, first_step: int, about: About | None = None) -> None:
        self._folder, self._about, self._began = folder, about, time.time()
        self._step = first_step - 1
        self._device = "cpu" if about is None else about.device
        self._recent: dict[str, deque[float]] = {tag: deque(maxlen=_RECENT) for tag in _FINAL}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._waiting: deque[Future[Any]] = deque()
        self._writer: Future[Any] = self._thread.submit(_open_writer, folder, first_step)
        if about is not None:
            self._submit(_write_session, folder, about, self._began, None)
            self._add(first_step, lambda: [_text("config", about.text)])

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Draw a line of metrics.jsonl."""
        scalars = scalars_of(record, self._device)
        for tag in _FINAL:
            if tag in scalars:
                self._recent[tag].append(scalars[tag])
        self.scalars(record["step"], scalars)

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Draw those events that have numbers: a validation, and a profile with a `step_breakdown`."""
        if event == "validation":
            self.scalars(step, {_VALIDATION: details["loss"]})
        elif event == "profile" and any((breakdown := details.get("step_breakdown") or {}).values()):
            self.add_profile(step, breakdown)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """tag to value."""
        self._step = max(self._step, step)
        self._add(step, lambda: [_scalar(tag, value) for tag, value in scalars.items()])

    def histograms(self, step: int, counted: "Counted") -> None:
        """counted: on the host."""

        def values() -> list[Any]:
            found, lost = counted.read()
            scalars = [_scalar(f"not_finite/{tag}", number) for tag, number in lost.items()]
            return [*(_histogram(tag, *each) for tag, each in found.items()), *scalars]

        self._add(step, values)

    def add_profile(self, step: int, breakdown: Mapping[str, float]) -> None:
        """Where a step's time went. breakdown: seconds of each part; drawn as one bar of the image
        `profile/step_breakdown` and as scalars `profile/<part>`."""
        legend = ", ".join(f"{part}: {colour}" for part, colour in zip(breakdown, COLOURS, strict=False))
        png, width, height = stacked_bar(list(breakdown.values()))
        self.scalars(step, {f"profile/{part}": seconds for part, seconds in breakdown.items()})
        self.add_image(step, "profile/step_breakdown", png, width, height, legend)

    def add_image(self, step: int, tag: str, png: bytes, width: int, height: int, description: str = "") -> None:
        """png: a whole file. description: what TensorBoard says of it."""
        self._add(step, lambda: [_image(tag, png, width, height, description)])

    def close(self, ended: Literal["finished", "stopped"] | None = None) -> None:
        """Write what is left. ended: how the run did, None where it goes on; else the table gets its medians."""
        # The first record has the start in it: compiling, caches that fill.
        finals = {_FINAL[tag]: median(list(values)[1:] or values) for tag, values in self._recent.items() if values}
        if ended is not None and finals:
            self.scalars(self._step, finals)
        if ended == "finished" and self._about is not None:
            self._submit(_write_session, self._folder, self._about, self._began, time.time())
        self._submit(lambda: self._writer.result().close())
        self._thread.shutdown(wait=True)
        for write in self._waiting:
            write.result()

    def _add(self, step: int, values: Callable[[], list[Any]]) -> None:
        self._submit(self._write, step, time.time(), values)

    def _submit(self, work: Callable[..., Any], *args: Any) -> None:
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(work, *args))

    def _write(self, step: int, at: float, values: Callable[[], list[Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.result().add_event(Event(wall_time=at, step=step, summary=Summary(value=values())))


def scalars_of(record: Mapping[str, Any], device: str) -> dict[str, float]:
    """Tags and values of a line of metrics.jsonl. What is unknown (None) or no number has no curve; a number without a
    tag of its own keeps its key."""
    tags = {**_TAGS, **_SHARES, "memory_peak_gib": _MEMORY[device]}
    numbers = {key: value for key, value in record.items() if type(value) in (int, float) and key not in _NO_CURVES}
    scalars = {tags.get(key, key): 100 * value if key in _SHARES else value for key, value in numbers.items()}
    if "data_time_s" in numbers and numbers.get("step_time_s"):
        scalars["time_metrics/data_loading(%)"] = 100 * numbers["data_time_s"] / numbers["step_time_s"]
    return scalars


def _open_writer(folder: Path, first_step: int) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), flush_secs=10)
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))
    return writer


def _write_session(folder: Path, about: About, began: float, ended: float | None) -> None:
    """The run's row in the table of recipes, in a file of its own that is replaced as a whole."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=began)
    for setting in about.settings:
        field = {bool: "bool_value", str: "string_value"}.get(type(setting.value), "number_value")
        setattr(start.hparams[setting.key], field, setting.value)
    experiment = api_pb2.Experiment(
        time_created_secs=began,
        hparam_infos=[
            api_pb2.HParamInfo(
                name=each.key,
                display_name=each.heading,
                type=kinds.get(type(each.value), api_pb2.DATA_TYPE_FLOAT64),
                differs=each.first,
            )
            for each in about.settings
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=heading)
            for tag, heading in _COLUMNS.items()
        ],
    )
    told = {
        metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=start),
    }
    if ended is not None:
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=ended)
        told[metadata.SESSION_END_INFO_TAG] = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    values = [
        Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
        for tag, data in told.items()
    ]
    partial = folder / "session.partial"  # not a name that readers take
    with partial.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        records.write(Event(wall_time=began, summary=Summary(value=values)).SerializeToString())
        records.flush()
    partial.replace(folder / _SESSION_FILE)


def _scalar(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata

    metadata = create_summary_metadata(display_name=tag, description="")
    return Summary.Value(tag=tag, metadata=metadata, tensor=_strings([text.encode()], dims=0))


def _histogram(tag: str, edges: list[float], counts: list[float]) -> Any:
    from tensorboard.compat.proto.histogram_pb2 import HistogramProto
    from tensorboard.compat.proto.summary_pb2 import Summary

    histogram = HistogramProto(min=edges[0], max=edges[-1], num=sum(counts), bucket_limit=edges[1:], bucket=counts)
    return Summary.Value(tag=tag, histo=histogram)


def _image(tag: str, png: bytes, width: int, height: int, description: str) -> Any:
    # As a tensor: of the older form, Summary.Image, the reader in Rust drops the description.
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata

    metadata = create_summary_metadata(display_name=tag, description=description)
    sizes = [str(width).encode(), str(height).encode()]
    return Summary.Value(tag=tag, metadata=metadata, tensor=_strings([*sizes, png], dims=1))


def _strings(values: list[bytes], dims: int) -> Any:
    """A tensor of one string, or with dims = 1 of a list of some."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))] * dims)
    return TensorProto(dtype=DT_STRING, string_val=values, tensor_shape=shape)
