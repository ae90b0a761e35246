"""One finished run as its folder tells it: curves, times, and how it ended. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torchtitan_lite.compare.checked import (
    CURVES,
    chain_of,
    counting,
    number_of,
    parts_of,
    peaks_of,
    read_mark,
    require_config,
)
from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.run_view import FAILURES
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.recipe_diff import Side as Described
from torchtitan_lite.recipe_diff import recorded

SMOOTHED_OVER = 5  # logged values, at least, of which the end of a run is the mean
_WARM_UP = (1, 20)  # steps whose times do not count, at least and at most; a tenth of the run between


@dataclass(frozen=True)
class Run:
    """A run that has logged at least one step.

    described: its config, as `config diff` takes it. identity: what samples and weights depend on. curve: by name the
    logged values in the order of steps. rates: MFUs, None where the peak is unknown. flops_per_token: of the whole
    model. mark: what the comparison that started it wrote down, {} for a run of its own. chain: its recipe, and what
    that extends. memory_by_rank: peaks in GiB, host: of the first rank; None where they are not recorded.
    """

    folder: Path
    described: Described
    identity: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    finished: bool
    told: str
    curve: Mapping[str, list[float]]
    rates: Sequence[float | None]
    flops_per_token: float
    validation_loss: float | None
    compile_s: float | None
    sent_gib: float | None
    breakdown: Mapping[str, float] | None
    mark: Mapping[str, Any] = field(default_factory=dict)
    chain: Sequence[str] = ()
    memory_by_rank: Sequence[float] | None = None
    host: str | None = None

    @property
    def seed(self) -> int:
        return int(self.described.config["debug"]["seed"])

    @property
    def ranks(self) -> int:
        return int(self.described.world_size or 1)

    @property
    def tokens_per_step(self) -> int:
        training = self.described.config["training"]
        return int(training["global_batch_size"]) * int(training["seq_len"])

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.curve["step"]]

    @property
    def warm(self) -> list[bool]:
        """Of each logged value, whether all of its steps come after the first ones, which have caches to fill and pages
        to touch."""
        steps = self.steps
        after = min(_WARM_UP[1], max(_WARM_UP[0], steps[-1] // 10))
        return [before >= after for before in (0, *steps[:-1])]

    def steady(self, name: str) -> list[float]:
        """Values that are warm; all, where none is."""
        return [value for value, warm in zip(self.curve[name], self.warm, strict=True) if warm] or self.curve[name]

    def step_time_s(self) -> float:
        return median(self.steady("step_time_s"))

    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens_per_step / self.step_time_s()

    def mfu(self) -> float | None:
        """None where the peak of the device is not known."""
        warm = [value for value, warm in zip(self.rates, self.warm, strict=True) if warm] or self.rates
        known = [value for value in warm if value is not None]
        return median(known) if known else None

    def final_loss(self) -> float:
        """The mean of the last tenth of the run, of SMOOTHED_OVER values at least."""
        return fmean(tail(self.curve["loss"]))


def tail(values: Sequence[float]) -> Sequence[float]:
    return values[-max(SMOOTHED_OVER, len(values) // 10) :]


def read_run(folder: Path) -> Run:
    """Raises UserError where there is no run, where nothing is logged, and for files that are not as a run of this
    version leaves them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; name a run folder (job.dump_folder), or a recipe ending in .toml")
    described, record = recorded(folder)
    require_config(record, folder / "config.json")
    lines = counting(read_lines(folder / "metrics.jsonl"), folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: no step is logged in metrics.jsonl; let it train first")
    path = folder / "events.jsonl"
    events = read_lines(path)
    finished, told = _ended(events, int(lines[-1]["step"]), int(described.config["training"]["steps"]))
    last = {str(event.get("event")): event for event in events}
    return Run(
        folder=folder,
        described=described,
        identity=record["identity"],
        device=str(record.get("device", "unknown")),
        versions=record["versions"],
        finished=finished,
        told=told,
        curve={name: [line[name] for line in lines] for name in CURVES},
        rates=[line["mfu"] for line in lines],
        flops_per_token=median(line["tflops"] * 1e12 / line["tps"] for line in lines),
        validation_loss=number_of(last.get("validation", {}).get("loss")),
        compile_s=number_of(last.get("compiled", {}).get("seconds")),
        sent_gib=number_of(last.get("traffic", {}).get("sent_gib")),
        breakdown=parts_of(last.get("profile", {}).get("step_breakdown"), path),
        mark=read_mark(folder) or {},
        chain=chain_of(record),
        host=last.get("start", {}).get("host"),
        memory_by_rank=peaks_of(last.get("end", {}).get("memory_peak_gib"), path) if finished else None,
    )


def _ended(events: Sequence[Mapping[str, Any]], step: int, steps: int) -> tuple[bool, str]:
    """Whether the run came to its end, and what is to be said where it did not."""
    for event in reversed(events):
        name = event.get("event")
        if name == "end":
            return True, ""
        if name in ("start", "preemption", *FAILURES):
            how = "no end is recorded" if name == "start" else str(name)
            return False, f"cut short at step {step} of {steps}: {how}"
    return step >= steps, "" if step >= steps else f"cut short at step {step} of {steps}: no end is recorded"
