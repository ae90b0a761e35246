"""Save and load a run with torch's distributed checkpoint (DCP): each rank its shards, any rank any name.

Everything in a checkpoint is a tensor under a name that no mesh changes, or a number in the manifest.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_lite.checkpoint import storage
from torchtitan_lite.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands. step: optimizer steps done. position: samples of the global order consumed."""

    step: int = 0
    position: int = 0
    tokens_seen: int = 0


class Model(Protocol):
    """What is saved: this rank's parameters, under names that no other rank has unless they are the same ones."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


class CheckpointManager:
    """Checkpoints of one run, in `folder`. identity: what may not change on a resume, kept in each manifest."""

    def __init__(
        self,
        folder: Path,
        keep_latest_k: int,
        model: Model,
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
    ) -> None:
        self._folder, self._keep = folder, keep_latest_k
        self._model, self._optimizer, self._identity = model, optimizer, identity
        self._device = next(parameter.device.type for _, parameter in model.named_parameters())

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        steps = storage.published_steps(self._folder)
        return steps[-1] if steps else None

    def folder_of(self, step: int) -> Path:
        return storage.step_folder(self._folder, step)

    def save(self, progress: Progress) -> Path:
        """Write, list, publish; collective. Returns the checkpoint's folder."""
        import torch.distributed.checkpoint as dcp

        staging = storage.staging_folder(self._folder, progress.step)
        final = self.folder_of(progress.step)
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # what a save that was killed left
            staging.mkdir(parents=True)
        dist.barrier()
        dcp.save(self._tensors(), storage_writer=dcp.FileSystemWriter(staging))
        files: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        # Every rank reads back what it wrote, so that the time does not grow with the ranks.
        dist.all_gather_object(files, storage.file_digests(staging, f"__{dist.get_rank()}_"))
        if dist.get_rank() == 0:
            listed = storage.file_digests(staging, ".metadata")
            for part in files:
                listed.update(part)
            if missing := [name for name in listed if not (staging / name).exists()]:
                raise UserError(f"{staging}: rank 0 does not see {missing[0]}; the nodes must share the run folder")
            contents = {
                "step": progress.step,
                "position": progress.position,
                "tokens_seen": progress.tokens_seen,
                "world_size": dist.get_world_size(),
                "device": self._device,
                "identity": self._identity,
                "files": listed,
            }
            if final.exists():  # without a manifest, or this step would have been resumed from
                storage.set_aside(final)
            storage.publish(staging, final, contents)
            storage.prune(self._folder, self._keep)
        dist.barrier()
        return final

    def load(self, step: int) -> tuple[Progress, int]:
        """Load the checkpoint of `step` into model, optimizer and random generators; collective.

        Returns where the run stood, and the number of ranks that saved it.
        """
        import torch.distributed.checkpoint as dcp

        final = self.folder_of(step)
        manifest = storage.read_manifest(final)
        _require_intact(final, manifest["files"])
        _materialize_state(self._optimizer)
        before = (manifest["world_size"], manifest["device"])
        same_ranks = before == (dist.get_world_size(), self._device)
        tensors = self._tensors(with_rng=same_ranks)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(final))
        if same_ranks:
            _set_rng_state(tensors)
        else:
            logger.info("saved by %d ranks on %s: random generators start from the seed", *before)
        return Progress(manifest["step"], manifest["position"], manifest["tokens_seen"]), manifest["world_size"]

    def _tensors(self, with_rng: bool = True) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        if with_rng:
            tensors.update(_rng_state())
        return tensors


def _require_intact(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise UserError on every rank where a file is not what the manifest says: torch would load it all the same.

    Each rank reads its part of the files.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = {name: files[name] for name in sorted(files)[rank::ranks]}
    found: list[list[str]] = [[]] * ranks
    dist.all_gather_object(found, storage.damaged(folder, own))
    if lines := [line for part in found for line in part]:
        raise UserError(f"{lines[0]}; move {folder} away to resume from the checkpoint before it")


def _materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that a first step would, and change no parameter: a step of rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _rng_names() -> dict[str, str]:
    rank = dist.get_rank()
    return {device: f"rng.rank{rank}.{device}" for device in ("cpu", "cuda")}


def _rng_state() -> dict[str, Tensor]:
    names = _rng_names()
    state = {names["cpu"]: torch.get_rng_state()}
    if torch.cuda.is_available():
        state[names["cuda"]] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(tensors: Mapping[str, Tensor]) -> None:
    names = _rng_names()
    torch.set_rng_state(tensors[names["cpu"]])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[names["cuda"]])
