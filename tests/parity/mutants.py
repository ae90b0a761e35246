"""Bugs of the kinds that have bitten this field, put into the running product; each has a mesh that must catch it.

A mutant is a context manager: within it the product is wrong. The product itself has no switches for any of this.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parity.cases import LLAMA, QWEN, case
from tests.parity.mutant import MODEL, PRODUCT, mutant, replaced
from torchtitan_lite.optim.loss import IGNORE

# The loss and what divides it


@mutant("loss divided by the micro-batches too", case(2, local=1))
def loss_divided_twice() -> Iterator[None]:
    def twice(right: Any) -> Any:
        def counts(self: Any, batches: Any) -> tuple[Tensor, Tensor]:
            tokens, samples = right(self, batches)
            return tokens * len(batches), samples

        return counts

    with replaced(f"{MODEL}.valid_counts", twice):
        yield


@mutant("loss divided by the rank's own tokens: a mean of means", case(2, shard=2))
def mean_of_means() -> Iterator[None]:
    def local(self: Any, batches: Any) -> tuple[Tensor, Tensor]:
        count = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        return torch.tensor(count * dist.get_world_size()), torch.tensor(len(batches))

    with patch(f"{MODEL}.valid_counts", local):
        yield


@mutant("tokens counted on every rank that shares a sequence", case(2, cp=2))
def tokens_counted_twice() -> Iterator[None]:
    with replaced(f"{PRODUCT}.assembly.Place", lambda right: lambda *a, **k: right(*a, **{**k, "counts": True})):
        yield


@mutant("loss reported by every tensor-parallel rank", case(2, tp=2))
def loss_reported_twice() -> Iterator[None]:
    with replaced(f"{PRODUCT}.assembly.Place", lambda right: lambda *a, **k: right(*a, **{**k, "reports": True})):
        yield


@mutant("pipeline's gradients not divided by the valid tokens, the reported loss right", case(2, pp=2))
def pipeline_gradients_of_the_sum() -> Iterator[None]:
    def wrong(self: Any, batches: Any) -> Tensor:
        valid, _ = self.valid_counts(batches)
        self._divisor = torch.ones_like(valid)
        return self._run(self._schedule.step, batches) / valid  # type: ignore[no-any-return]

    with patch(f"{PRODUCT}.staged.StagedModel.forward_backward", wrong):
        yield


@mutant("pipeline's gradients divided by the micro-batches", case(2, pp=2, schedule="GPipe"))
def pipeline_gradients_scaled() -> Iterator[None]:
    def scaling(right: Any) -> Any:
        def find(name: str) -> type:
            cls = right(name)

            class Scaling(cls):  # type: ignore[misc, valid-type]
                def __init__(self, *args: Any, **kwargs: Any) -> None:
                    super().__init__(*args, **{**kwargs, "scale_grads": True})

            return Scaling

        return find

    with replaced(f"{PRODUCT}.distributed.pipeline.get_schedule_class", scaling):
        yield


# Samples


@mutant("last micro-batch dropped", case(2, local=1))
def last_microbatch_dropped() -> Iterator[None]:
    target = f"{PRODUCT}.trainable.WholeModel.forward_backward"
    with replaced(target, lambda right: lambda self, batches: right(self, batches[:-1])):
        yield


@mutant("last micro-batch of a pipeline empty", case(2, pp=2, schedule="Interleaved1F1B"))
def last_microbatch_empty() -> Iterator[None]:
    def emptied(right: Any) -> Any:
        def wrong(self: Any, batches: Any) -> Tensor:
            last = replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORE))
            return right(self, [*batches[:-1], last])  # type: ignore[no-any-return]

        return wrong

    with replaced(f"{PRODUCT}.staged.StagedModel.forward_backward", emptied):
        yield


@mutant("rows that fill up a short rank's batch have a loss", case(3, recipe={"training.global_batch_size": 7}))
def padding_has_a_loss() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def batch(self: Any, samples: Any, size: int) -> Any:
            made = right(self, samples, size)
            made.labels[len(samples) :] = 0
            return made

        return batch

    with replaced(f"{PRODUCT}.data.loader.SampleStore.batch", wrong):
        yield


@mutant("every data-parallel rank reads the same samples", case(2, shard=2))
def same_samples() -> Iterator[None]:
    with patch(f"{PRODUCT}.distributed.parallel_dims.ParallelDims.batch_rank", lambda self, rank: 0):
        yield


@mutant("ranks of one tensor-parallel group read different samples", case(4, shard=2, tp=2))
def different_samples() -> Iterator[None]:
    target = f"{PRODUCT}.distributed.parallel_dims.ParallelDims.batch_rank"
    with patch(target, lambda self, rank: rank % self.batch_ranks):
        yield


# Reductions of gradients


@mutant("gradients averaged over ranks instead of summed", case(2, shard=2))
def gradients_averaged() -> Iterator[None]:
    target = "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor"
    with replaced(target, lambda right: lambda self, factor: right(self, 2.0)):
        yield


@mutant("gradients not summed over context-parallel ranks", case(2, cp=2))
def no_reduction_over_cp() -> Iterator[None]:
    with patch(f"{PRODUCT}.assembly.data_axes", lambda mesh: mesh["dp_shard"]):
        yield


@mutant("gradients not summed over replicas", case(2, replicate=2, shard=1, local=2))
def no_reduction_over_replicas() -> Iterator[None]:
    with patch(f"{PRODUCT}.assembly.data_axes", lambda mesh: mesh["dp_shard"]):
        yield


def _unsummed(style: str) -> AbstractContextManager[Any]:
    """The weights of modules of that style whole on every rank, their gradients of a rank's part only."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel.style import ParallelStyle

    class Unsummed(ParallelStyle):
        def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
            weight = nn.Parameter(DTensor.from_local(module.weight.data, mesh, [Replicate()], run_check=False))  # type: ignore[arg-type]
            module.weight = weight
            eps = module.eps
            module.forward = lambda x: nn.functional.rms_norm(x, weight.shape, module.weight.to_local(), eps)  # type: ignore[operator, method-assign, arg-type]
            return module

    def styles(right: Any) -> Any:
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import ColwiseParallel

        output = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
        return lambda logits: {**right(logits), style: Unsummed, "output": lambda: output}

    return replaced(f"{PRODUCT}.distributed.tensor_parallel._styles", styles)


@mutant("norm weights' gradients not summed under sequence parallelism", case(2, tp=2))
def norms_unsummed() -> Iterator[None]:
    with _unsummed("sequence"):
        yield


@mutant("gradients of query and key norms not summed over heads", case(2, QWEN, tp=2))
def head_norms_unsummed() -> Iterator[None]:
    with _unsummed("head_norm"):
        yield


@mutant("tied output matrix hands no gradient to the embedding", case(2, "DEEP_LLAMA/tied", shard=2))
def tied_weights_unsynchronised() -> Iterator[None]:
    target = f"{PRODUCT}.models.common.layers.TiedOutput.forward"
    with replaced(target, lambda right: lambda self, x, weight: right(self, x, weight.detach())):
        yield


@mutant("gradients of gathered keys and values not summed over ranks", case(2, cp=2))
def gathered_gradient_of_own_rank() -> Iterator[None]:
    def own(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.group.rank()], None

    with patch(f"{PRODUCT}.distributed.collectives._Gather.backward", staticmethod(own)):
        yield


@mutant(
    "zero-bubble schedule over parameters that are freed after the forward",
    case(4, shard=2, pp=2, schedule="ZBVZeroBubble"),
)
def zero_bubble_frees_parameters() -> Iterator[None]:
    # Stages are small: with units joined each would be one, which is kept in any case.
    alone = patch(f"{PRODUCT}.distributed.data_parallel._TOGETHER", 0)
    with alone, patch(f"{PRODUCT}.assembly._frees_parameters", lambda recipe: True):
        yield


@mutant(
    "compiled block takes a collective's wait() for a plain tensor", case(2, compiled=True, tp=2, backend="aot_eager")
)
def compiled_wait() -> Iterator[None]:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    def wrong(module: Any, args: Any, output: Any) -> Any:
        return output.wait() if isinstance(output, AsyncCollectiveTensor) else output

    with patch(f"{PRODUCT}.distributed.tensor_parallel._settle", wrong):
        yield


# Parts of a sequence


@mutant("rotary positions of a rank's tokens count from 0", case(2, cp=2))
def rope_offset() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def arguments(self: Any, *args: Any) -> Any:
            given = right(self, *args)
            return {**given, "positions_L": torch.arange(len(given["positions_L"]))}

        return arguments

    with replaced(f"{MODEL}.arguments", wrong):
        yield


@mutant("heads exchanged over pieces of the sequence that are balanced for gathering", case(2, cp=2, method="alltoall"))
def exchanged_pieces_out_of_order() -> Iterator[None]:
    def balanced(right: Any) -> Any:
        return lambda self, seq_len: right(replace(self, method="allgather"), seq_len)

    with replaced(f"{PRODUCT}.distributed.context_parallel.SequenceShare.positions", balanced):
        yield


@mutant("labels of another part of the sequence than the tokens", case(2, cp=2))
def labels_of_another_part() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def part_of(self: Any, rows: Tensor) -> Tensor:
            share = self.place.share
            return rows.chunk(share.ranks, dim=1)[share.rank] if bool((rows < 0).any()) else right(self, rows)

        return part_of

    with replaced(f"{MODEL}.part_of", wrong):
        yield


@mutant("second pieces of gathered keys left in the order of the ranks", case(2, cp=2))
def gathered_pieces_out_of_order() -> Iterator[None]:
    with patch("torch.Tensor.flip", lambda self, *dims: self):
        yield


@mutant("document mask of the first positions instead of the rank's", case(2, QWEN, cp=2))
def mask_of_other_rows() -> Iterator[None]:
    target = f"{PRODUCT}.distributed.context_parallel.SequenceShare.query_positions"
    with patch(target, lambda self, seq_len: torch.arange(seq_len // self.ranks)):
        yield


@mutant("key heads copied to the wrong ranks", case(4, "SPEC/tiny", cp=4, method="alltoall"))
def key_heads_out_of_order() -> Iterator[None]:
    def repeated(self: Tensor, copies: int, dim: int) -> Tensor:
        return torch.cat([self] * copies, dim=dim)

    with patch("torch.Tensor.repeat_interleave", repeated):
        yield


@mutant("document mask lost behind the first stage", case(2, pp=2))
def mask_lost_between_stages() -> Iterator[None]:
    def lost(right: Any) -> Any:
        def arguments(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
            return right(self, module, args, kwargs if module.tok_embeddings is not None else {})

        return arguments

    with replaced(f"{PRODUCT}.staged.StagedModel._with_arguments", lost):
        yield


# The vocabulary in parts


class _OffByOne:
    """A process group that names the wrong rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group_name, self._rank = group.group_name, group.rank()

    def rank(self) -> int:
        return max(self._rank - 1, 0)


@mutant("offset of a rank's part of the vocabulary wrong", case(2, tp=2))
def vocabulary_offset() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        return staticmethod(lambda ctx, logits, labels, group: right(ctx, logits, labels, _OffByOne(group)))

    with replaced(f"{PRODUCT}.optim.loss._ShardedCrossEntropy.forward", wrong):
        yield


@mutant("largest logit of a rank's part of the vocabulary taken for that of all", case(2, tp=2))
def largest_logit_not_shared() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        return lambda x, op, group: x if op == "max" else right(x, op, group)

    with replaced(f"{PRODUCT}.optim.loss.all_reduce", wrong):
        yield


# The gradient norm


@mutant("strided shards of FSDP over tensor parallelism left out of the norm's sum", case(4, shard=2, tp=2))
def norm_without_strided_shards() -> Iterator[None]:
    def wrong(grad: Any) -> Any:
        placements = enumerate(grad.placements)
        return grad.device_mesh, tuple(axis for axis, placement in placements if placement.is_shard())

    with patch(f"{PRODUCT}.optim.gradients._sharded_over", wrong):
        yield


@mutant("replicated parameters counted once for each tensor-parallel rank", case(2, tp=2))
def norm_counts_replicas() -> Iterator[None]:
    target = f"{PRODUCT}.optim.gradients._sharded_over"
    with patch(target, lambda grad: (grad.device_mesh, tuple(range(grad.device_mesh.ndim)))):
        yield


@mutant("norm of this rank's pipeline stages only", case(2, pp=2))
def norm_of_own_stages() -> Iterator[None]:
    target = f"{PRODUCT}.trainer.clip_by_global_norm"
    with replaced(target, lambda right: lambda parameters, max_norm, stages: right(parameters, max_norm, None)):
        yield


# Initial weights and validation


@mutant("every rank draws its shard of the initial weights from one seed, as DTensor does on CPU", case(2, LLAMA, tp=2))
def weights_by_shard() -> Iterator[None]:
    def first_shard(right: Any) -> Any:
        def shape_and_offset(*args: Any) -> Any:
            shape, offset = right(*args)
            return shape, (0,) * len(offset)

        return shape_and_offset

    target = f"{PRODUCT}.models.common.initialize.compute_local_shape_and_global_offset"
    with replaced(target, first_shard):
        yield


@mutant("validation counts the rows that fill up its last batch", case(2, shard=2))
def validation_counts_padding() -> Iterator[None]:
    def wrong(right: Any) -> Any:
        def evaluate(self: Any, batches: Any) -> Tensor:
            # Rows of a loss have labels; these have none at all.
            batches = list(batches)
            padding = [(batch.labels == IGNORE).all(dim=1, keepdim=True) for batch in batches]
            labels = [batch.labels.masked_fill(rows, 0) for batch, rows in zip(batches, padding, strict=True)]
            filled = [replace(batch, labels=own) for batch, own in zip(batches, labels, strict=True)]
            return right(self, filled)  # type: ignore[no-any-return]

        return evaluate

    with replaced(f"{MODEL}.evaluate", wrong):
        yield
