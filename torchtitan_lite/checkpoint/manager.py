"""Save and load a run: which tensors a checkpoint holds, which checkpoint is taken, and what is done with a bad one."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_lite.checkpoint import storage
from torchtitan_lite.checkpoint.saver import BESIDE, Saver
from torchtitan_lite.checkpoint.shards import Stored, is_written_here, part_of
from torchtitan_lite.checkpoint.storage import Damaged
from torchtitan_lite.config.schema import Checkpoint
from torchtitan_lite.distributed.runtime import from_first_rank, patient_group
from torchtitan_lite.errors import UserError
from torchtitan_lite.optim.optimizer import new_state
from torchtitan_lite.strict_json import flat

# What a checkpoint says of its run that a run which goes on from it must share.
_MODEL = ("model", "tokenizer")
_IDENTITY = (*_MODEL, "data", "training.seq_len", "debug.seed")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands. step: optimizer steps done. position: samples of the global order consumed."""

    step: int = 0
    position: int = 0
    tokens_seen: int = 0


@dataclass(frozen=True)
class Loaded:
    """What was loaded: where the run stood, how many ranks had saved it, and the samples of its steps."""

    progress: Progress
    world_size: int
    global_batch_size: int
    folder: Path


class Model(Protocol):
    """What is saved: this rank's parameters, under names that no other rank has unless they are the same ones."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


class CheckpointManager:
    """Checkpoints of one run, in `folder`.

    record: what a manifest says beside progress and files: identity (what may not change on a resume), mesh, versions.
    first_peer: the first of the ranks that hold the same layers as this one. event: writes a line of events.jsonl.
    equal: tensors beside model and optimizer that are the same on every rank; a checkpoint without them leaves them as
    they are.
    """

    def __init__(
        self,
        section: Checkpoint,
        folder: Path,
        model: Model,
        optimizer: torch.optim.Optimizer,
        record: Mapping[str, Any],
        first_peer: int,
        event: Callable[..., None],
        equal: Mapping[str, Tensor],
    ) -> None:
        self._section, self._folder, self._event = section, folder, event
        self._model, self._optimizer, self._first_peer, self._equal = model, optimizer, first_peer, equal
        self._device = next(parameter.device.type for _, parameter in model.named_parameters())
        self._record = {**record, "world_size": dist.get_world_size(), "device": self._device}
        self.group = patient_group()
        self.saver = Saver(folder, section.async_mode, section.keep_latest_k, self.group)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, good or not; None where there is none."""
        steps = storage.published_steps(self._folder)
        return steps[-1] if steps else None

    def save(self, progress: Progress, *, model_only: bool = False) -> None:
        """Begin to save, or do it where async_mode is disabled; the saver knows how it went. Collective."""
        tensors = self._tensors(model_only=model_only)
        own = {
            name: part_of(tensor)
            for name, tensor in tensors.items()
            if name.startswith("rng.") or is_written_here(name, tensor, 0 if name in self._equal else self._first_peer)
        }
        # What the stage's first rank knows of all its ranks' tensors: see Saver.
        whole = sum(t.numel() for name, t in tensors.items() if not name.startswith(BESIDE))
        own = {name: part for name, part in own.items() if part.local.numel()}
        contents = {**vars(progress), "holds": "model" if model_only else "all", **self._record}
        self.saver.save(progress.step, own, contents, whole if dist.get_rank() == self._first_peer else 0)

    def resume(self, step: int = -1) -> Loaded | None:
        """Load the newest good checkpoint, or that of `step`; None where there is none at all. Collective.

        A bad one is named, recorded and renamed, and the one before it is taken. Raises UserError where
        checkpoint.strict or `step` asks for that very one, or where none is good.
        """
        for name in self._on_first_rank(lambda: storage.take_away_left_overs(self._folder)) or []:
            logger.warning("removed %s, which a save or a removal that was cut short had left", self._folder / name)
            self._event("left over", 0, path=str(self._folder / name))
        steps = from_first_rank(storage.published_steps(self._folder), self.group)
        candidates = [step] if step != -1 else steps[::-1]
        for candidate in candidates:
            folder = storage.step_folder(self._folder, candidate)
            try:
                loaded = self._load(folder, _IDENTITY)
            except Damaged as damage:
                if self._section.strict or step != -1:
                    raise UserError(f"{damage}; move {folder} away to take the one before it") from None
                self._set_aside([candidate], "bad", "bad checkpoint", str(damage))
                continue
            if later := [other for other in steps if step != -1 and other > step]:
                self._set_aside(later, "superseded", "superseded checkpoint", f"the run goes back to step {step}")
            return loaded
        if steps:
            raise UserError(
                f"{self._folder}: none of its {len(steps)} checkpoints is good, they are renamed .bad; start over in "
                "another job.dump_folder"
            )
        return None

    def load_initial(self, path: str) -> Loaded:
        """Load from the checkpoint at `path`, of another run: the model's tensors only, or all that
        exclude_from_loading leaves. Raises UserError where that is no good checkpoint of such a model. Collective."""
        section = self._section
        folder = from_first_rank(self._agreed(lambda: storage.find_checkpoint(path)), self.group)
        kept: tuple[str, ...] = ("model.name", "tokenizer")
        if not section.initial_load_model_only:
            kept = _MODEL if "dataloader" in section.exclude_from_loading else _IDENTITY
        try:
            excluded = (*section.exclude_from_loading, "faults")
            return self._load(folder, kept, model_only=section.initial_load_model_only, excluded=excluded)
        except Damaged as damage:
            raise UserError(f"checkpoint.initial_load_path: {damage}; choose another checkpoint") from None

    def _load(
        self, folder: Path, kept: Sequence[str], *, model_only: bool = False, excluded: Sequence[str] = ()
    ) -> Loaded:
        """Verify on all ranks, then read; kept: sections of the identity that must be this run's. excluded: groups of
        tensors that are not read, `optimizer` or `faults`.

        Raises Damaged, or UserError where it is good and of something else, on all ranks alike.
        """
        manifest = self._agreed(lambda: storage.read_manifest(folder))
        self._agreed(lambda: _require_intact(folder, manifest["files"]))
        _require_same(folder, manifest, self._record["identity"], kept, model_only=model_only)
        stored = self._agreed(lambda: Stored(folder, sorted(manifest["files"])))
        self._require_no_more(folder, stored)
        self._agreed(lambda: self._read(stored, manifest, model_only, excluded))
        progress = Progress(**{field.name: manifest[field.name] for field in fields(Progress)})
        return Loaded(progress, manifest["world_size"], manifest["global_batch_size"], folder)

    def _require_no_more(self, folder: Path, stored: Stored) -> None:
        """Raise UserError where the checkpoint's model has a tensor that this one has not. Collective."""
        own = set(self._model.state_dict()) if dist.get_rank() == self._first_peer else set()
        all_names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_names, own, group=self.group)
        if more := sorted(set(stored.names("model.")).difference(*all_names)):
            raise UserError(f"{folder}: its model has {more[0]}, and this one has not; choose another checkpoint")

    def _read(self, stored: Stored, manifest: Mapping[str, Any], model_only: bool, excluded: Sequence[str]) -> None:
        if not model_only and "optimizer" not in excluded:
            self._make_state(stored)
        for name, tensor in self._tensors(model_only=model_only).items():
            if name.startswith("rng.") or name.partition(".")[0] in excluded:
                continue
            if name in self._equal and not stored.names(name):
                logger.info("the checkpoint has no %s, it was saved with that turned off: from new", name)
                continue
            stored.read_into(name, part_of(tensor))
        if model_only:
            return
        before = (manifest["world_size"], manifest["device"])
        if before == (dist.get_world_size(), self._device):
            for name, state in _rng_state().items():
                stored.read_into(name, part_of(state))
                (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(state)
        else:
            logger.info("saved by %d ranks on %s: random generators start from the seed", *before)

    def _make_state(self, stored: Stored) -> None:
        """Give the optimizer the state of all parameters of which the checkpoint has some, to be filled: a step would
        make it too, and take a gradient's memory for it."""
        for name, parameter in self._model.named_parameters():
            prefix = f"optimizer.{name}."
            # A dot is of a longer parameter name.
            if any("." not in key for key in stored.names(prefix)):
                self._optimizer.state[parameter] = new_state(self._optimizer, parameter)

    def _tensors(self, *, model_only: bool) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        if model_only:
            return tensors
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return {**tensors, **self._equal, **_rng_state()}

    def _set_aside(self, steps: Sequence[int], suffix: str, event: str, why: str) -> None:
        for step in steps:
            folder = storage.step_folder(self._folder, step)
            if aside := self._on_first_rank(lambda: storage.set_aside(folder, suffix)):  # noqa: B023  # called here
                self._event(event, step, why=why, path=str(aside))
                logger.warning("%s: %s; renamed to %s", event, why, aside.name)

    def _on_first_rank(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, None on the other ranks; raises UserError on all where the disk does not let it."""

        def attempt() -> Any:
            try:
                return work() if dist.get_rank() == 0 else None
            except OSError as error:
                raise UserError(
                    f"{error.filename}: {error.strerror}; a run tidies its checkpoints: mend the disk or permissions"
                ) from None

        return self._agreed(attempt)

    def _agreed(self, attempt: Callable[[], Any]) -> Any:
        """The result of `attempt`; raises on every rank what it raised on the first rank where it did. Collective."""
        error: Exception | None = None
        result = None
        try:
            result = attempt()
        except (Damaged, UserError) as caught:
            error = caught
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self.group)
        if first := next((error for error in errors if error is not None), None):
            raise first
        return result


def _require_intact(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise Damaged where a file of this rank's share is not what the manifest says."""
    if lines := storage.damages(folder, storage.share(files, dist.get_rank(), dist.get_world_size())):
        raise Damaged(lines[0])


def _require_same(
    folder: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any], kept: Sequence[str], *, model_only: bool
) -> None:
    """Raise UserError for a good checkpoint of something else; say what else differs of the model."""
    if manifest["holds"] == "model" and not model_only:
        raise UserError(
            f"{folder}: holds the model alone (it was saved with checkpoint.last_save_model_only = true), and a run "
            "needs its optimizer to go on; resume from a full one with checkpoint.load_step, or start a new run from "
            "it with checkpoint.initial_load_path"
        )
    was, now = flat(manifest["identity"]), flat(identity)
    for key in sorted(was | now):
        if was.get(key) == now.get(key):
            continue
        if any(key == name or key.startswith(f"{name}.") for name in kept):
            raise UserError(
                f"{folder}: was saved with {key} = {was.get(key)}, and this run has {now.get(key)}; set it back or "
                "choose another checkpoint"
            )
        if key.startswith("model."):
            logger.warning("%s was saved with %s = %s, this run has %s", folder, key, was.get(key), now.get(key))


def _rng_state() -> dict[str, Tensor]:
    rank = dist.get_rank()
    state = {f"rng.rank{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.rank{rank}.cuda"] = torch.cuda.get_rng_state()
    return state
