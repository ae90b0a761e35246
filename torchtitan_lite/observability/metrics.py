"""Rates and records of the steps between two log lines. No torch, no sync: what is measured is handed in."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StepClock:
    """Times since the last record.

    flops_per_token, tokens_per_step: of the whole step. devices: ranks that share it. peaks: name of a utilisation to
    the TFLOP/s of one device that it is over, None where unknown. settle: waits for what the device has yet to do.
    """

    flops_per_token: float
    tokens_per_step: int
    devices: int
    peaks: Mapping[str, float | None]
    settle: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a window now."""
        self._start = time.perf_counter()
        self._data_time = 0.0
        self._steps = 0

    def took_data(self, seconds: float) -> None:
        """Add the time in which a step waited for its data."""
        self._data_time += seconds
        self._steps += 1

    @contextmanager
    def paused(self, *, settled: bool = True) -> Iterator[None]:
        """Leave out what is no step: validation, checkpoints. settled: False for what is over at once, and not worth a
        wait for the device, whose steps' time it would leave out else."""
        if settled:
            self.settle()
        paused = time.perf_counter()
        yield
        self._start += time.perf_counter() - paused

    def record(self) -> dict[str, Any]:
        """step_time_s, data_time_s (means), tps (tokens/s and device), tflops (per device), utilisations; starts
        anew."""
        elapsed = time.perf_counter() - self._start
        tps = self._steps * self.tokens_per_step / elapsed / self.devices
        tflops = tps * self.flops_per_token / 1e12
        record = {
            "step_time_s": elapsed / self._steps,
            "data_time_s": self._data_time / self._steps,
            "tps": tps,
            "tflops": tflops,
            **{name: tflops / peak if peak else None for name, peak in self.peaks.items()},
        }
        self.restart()
        return record


def console_line(record: dict[str, Any]) -> str:
    """A record in the columns of the console; the step stands before each line of a log."""
    mfu = _percent(record["mfu"])
    if "mfu_float8" in record:
        mfu += f"  mfu_float8 {_percent(record['mfu_float8'])}"
    experts = ""
    if "moe_largest_share" in record:
        aux = "" if record["moe_aux_loss"] is None else f"  aux {record['moe_aux_loss']:.4f}"
        experts = f"{aux}  largest share {record['moe_largest_share']:.1%}"
    return (
        f"loss {record['loss']:7.4f}  grad_norm {record['grad_norm']:7.4f}{experts}  lr {record['lr']:.2e}  "
        f"tps {record['tps']:>7,.0f}  tflops {record['tflops']:.3g}  mfu {mfu}  "
        f"memory {record['memory_peak_gib']:.2f} GiB  data {record['data_time_s'] * 1000:.1f} ms"
    )


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"
