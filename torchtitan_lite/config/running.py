"""Sections on what keeps a run going: checkpoints, signals, wrong numbers, time-outs. As in schema.py."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_lite.config.setting import setting

_WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    enable: bool = False
    """Save every `interval` steps and at the end, and resume from the latest good checkpoint on start."""

    folder: str = "checkpoint"
    """Folder of checkpoints inside the run folder."""

    interval: int = setting(500, minimum=1)
    """Steps between checkpoints."""

    interval_minutes: float = setting(-1.0, above=0.0, auto=-1)
    """Also save where so many minutes have passed since the last one, by the first rank's clock. -1: by steps only."""

    keep_latest_k: int = setting(10, minimum=0)
    """Complete checkpoints to keep; 0 keeps all. Bad ones do not count, and the last one that a run can be resumed from
    stays."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """`async`: training waits for a copy to host memory only, and a thread writes it; the memory is kept for the next
    save. `async_with_pinned_mem`: in pinned memory where there is CUDA, so that the copy is as fast as the bus."""

    strict: bool = False
    """Stop at a bad checkpoint instead of going back to the one before it."""

    load_step: int = setting(-1, minimum=0, auto=-1)
    """Resume from the checkpoint of this step; later ones are renamed. -1: from the latest. What torchrun restarts goes
    on from the latest."""

    initial_load_path: str = ""
    """A checkpoint, or a folder of some, that a new run takes its first weights from; no effect once it has checkpoints
    of its own."""

    initial_load_model_only: bool = True
    """Take the model's tensors alone from `initial_load_path`; else optimizer, step and data position too."""

    exclude_from_loading: list[Literal["optimizer", "dataloader", "train_state"]] = field(default_factory=list)
    """What not to take from `initial_load_path`: `optimizer`, `dataloader` (the data position), `train_state` (step and
    tokens seen)."""

    last_save_model_only: bool = False
    """Save the model's tensors alone after the last step; such a run cannot be continued from there."""


@dataclass(frozen=True)
class Elastic:
    """Leaving when told to."""

    grace_seconds: int = setting(30, minimum=1)
    """Time that ranks have, once told to stop, to reach the end of a step, save and leave; torchrun kills them after
    it."""


@dataclass(frozen=True)
class Faults:
    """Steps whose loss or gradient norm is wrong: skipped by all ranks, their samples named in events.jsonl."""

    skip_nonfinite: bool = True
    """Skip a step whose loss or gradient norm is infinite or no number: parameters and optimizer stay as they are."""

    loss_spike_sigmas: float = setting(0.0, minimum=0.0)
    """Also skip a step whose loss is more than so many standard deviations above the running mean. 0: no such limit."""

    grad_norm_spike_sigmas: float = setting(0.0, minimum=0.0)
    """The same for the gradient norm before clipping."""

    warmup_steps: int = setting(100, minimum=2)
    """Good steps that the running mean must hold before spikes are judged by it."""

    max_in_a_row: int = setting(3, minimum=0)
    """Steps that may be skipped one after another; one more, and `then` is done."""

    then: Literal["stop", "roll_back"] = "stop"
    """`stop`: save the last good state and end. `roll_back`: go back to the latest checkpoint and pass over the samples
    of the skipped steps, for good."""


@dataclass(frozen=True)
class Comm:
    """Time-outs, and what is kept of a hang."""

    init_timeout_seconds: int = setting(300, minimum=1, maximum=_WEEK_S)
    """Seconds that a rank may do nothing or wait for others, until the end of the first step."""

    train_timeout_seconds: int = setting(100, minimum=1, maximum=_WEEK_S)
    """The same, after the first step."""

    save_traces_folder: str = "comm_traces"
    """Folder inside the run folder for the stacks and collectives of ranks that hang."""

    trace_buf_size: int = setting(20000, minimum=0)
    """Collectives that torch's flight recorder keeps of each rank, written where a run hangs; 0 for none."""
