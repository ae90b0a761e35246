"""From a model family and a mesh to something that trains.

The order in which techniques are applied stands here, each with its reason.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_lite.config.schema import Parallelism, Training
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.data_parallel import apply_data_parallel, reduce_across_replicas
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.optim.loss import IGNORE, token_loss_sum


class TrainableModel:
    """What the trainer drives, whatever the mesh.

    module: this rank's part. device: where it lies.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Accumulate gradients over this rank's micro-batches of one step.

        Returns this rank's part of the loss (float32 scalar); the parts of all ranks that read samples sum
        to the mean over the valid tokens of the global batch. Gradients come out as those of that mean.
        """
        valid = self._valid_tokens(batches)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            reduce_across_replicas(self.module, index == len(batches) - 1)
            loss = self._loss_sum(batch) / valid
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """The mean loss over the valid tokens of all ranks' batches: float64 scalar, the same on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            sums[0] += self._loss_sum(batch)
            sums[1] += (batch.labels != IGNORE).sum()
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def _loss_sum(self, batch: Batch) -> Tensor:
        return token_loss_sum(self.module(self._on_device(batch.tokens)), self._on_device(batch.labels))

    def _on_device(self, host: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return host
        # Only a copy from pinned memory leaves the host free to go on.
        return host.pin_memory().to(self.device, non_blocking=True)

    def _valid_tokens(self, batches: Sequence[Batch]) -> Tensor:
        """Tokens with a label in the global batch: int64 scalar; a float32 would round sums above 2^24."""
        local = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        # Filled on the device: a copy from the host would wait for it.
        count = torch.full((), local, dtype=torch.int64, device=self.device)
        dist.all_reduce(count)
        return count


def assemble(
    spec: ModelSpec,
    args: object,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    training: Training,
    parallelism: Parallelism,
    seed: int,
) -> TrainableModel:
    """Build, spread over `mesh`, materialise and initialise a model.

    Peak memory is this rank's share: the whole model exists on the meta device only.
    """
    # Meta first: a 405B model has no room anywhere before it is sharded.
    with torch.device("meta"):
        module = spec.build(args)
    # Sharding last of all that changes modules: it hooks what the others leave. One rank in full precision has
    # nothing to share or cast and stays plain.
    if mesh.size() > 1 or training.mixed_precision_param != "float32":
        apply_data_parallel(
            module,
            mesh,
            spec.plan(args).fsdp_units,
            param_dtype=training.mixed_precision_param,
            reduce_dtype=training.mixed_precision_reduce,
            reshard_after_forward=parallelism.fsdp_reshard_after_forward != "never",
        )
    # Materialised after sharding, so that each rank allocates and draws its shards only.
    module.to_empty(device=device)
    initialize(module, seed, lambda name: spec.initial(name, args))
    return TrainableModel(module, device)
