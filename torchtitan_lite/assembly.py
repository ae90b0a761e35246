"""From a model family and a mesh to something that trains.

The order in which techniques are applied stands here, each with its reason.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.distributed.compile import apply_compile
from torchtitan_lite.distributed.context_parallel import SequenceShare, apply_context_parallel
from torchtitan_lite.distributed.data_parallel import DataPlan, apply_data_parallel
from torchtitan_lite.distributed.mesh import axis, data_axes
from torchtitan_lite.distributed.parallel_dims import ParallelDims
from torchtitan_lite.distributed.pipeline_plan import PipelinePlan
from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.tensor_parallel import apply_tensor_parallel, enable_async
from torchtitan_lite.distributed.units import require_names, take_out_other_stages
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.trainable import Place, TrainableModel, WholeModel


@dataclass(frozen=True)
class Recipe:
    """What is to be assembled, all of it resolved.

    spec, args: the model. plan: where techniques attach to it. pipeline: its stages, None without a pipeline.
    """

    config: JobConfig
    dims: ParallelDims
    spec: ModelSpec
    args: Any
    plan: ParallelPlan
    pipeline: PipelinePlan | None


def assemble(recipe: Recipe, mesh: DeviceMesh, device: torch.device, rank: int) -> TrainableModel:
    """Build, spread over `mesh`, materialise and initialise the part of a model that is `rank`'s.

    Peak memory is this rank's share: the whole model exists on the meta device only.
    """
    config, pipeline, at = recipe.config, recipe.pipeline, recipe.dims.coordinate(rank)
    share = SequenceShare(config.parallelism.context_parallel_rotate_method, at["cp"], recipe.dims.cp)
    place = Place(
        device,
        config.training.seq_len,
        share,
        counts=at["tp"] == at["cp"] == at["pp"] == 0,
        reports=at["tp"] == 0,
    )
    if pipeline is None:
        module = _spread(recipe, _built(recipe, None), mesh, device)
        return WholeModel(module, place, whole_gradients=not _frees_parameters(recipe))
    from torchtitan_lite.staged import StagedModel

    stages = axis(mesh, "pp")
    assert stages is not None
    parts = [_spread(recipe, _built(recipe, stage), mesh, device) for stage in pipeline.stages_of(at["pp"])]
    # The schedule last: it runs the stages as everything else has left them.
    return StagedModel(parts, place, stages, pipeline, lambda stage: _edges(recipe, stage))


def _built(recipe: Recipe, stage: int | None) -> nn.Module:
    # Meta first: a 405B model has no room anywhere before it is sharded.
    with torch.device("meta"):
        module = recipe.spec.build(recipe.args)
    units = tuple(recipe.args.flops_by_module(recipe.config.training.seq_len))
    require_names(module, recipe.plan, units)
    if stage is not None and recipe.pipeline is not None:
        # Stages before techniques: none of them then works on what another rank holds.
        take_out_other_stages(module, units, recipe.pipeline.stages[stage])
    return module


def _spread(recipe: Recipe, module: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """All techniques but the pipeline, on a module on meta; returns it materialised and initialised."""
    config, plan = recipe.config, recipe.plan
    tensor, context = axis(mesh, "tp"), axis(mesh, "cp")
    # Wraps attention, which has no parameters: before the others see the modules that are there in the end.
    if context is not None and plan.context is not None:
        method, seq_len = config.parallelism.context_parallel_rotate_method, config.training.seq_len
        apply_context_parallel(module, context, plan.context, method, seq_len)
    # Splits matrices, before FSDP shards what is left of them.
    if tensor is not None and plan.tensor is not None:
        if config.parallelism.enable_async_tensor_parallel:
            enable_async(tensor)
        apply_tensor_parallel(module, tensor, plan.tensor, loss_parallel=not config.parallelism.disable_loss_parallel)
    # After what changes a block's graph, before FSDP, whose hooks stay outside the graphs.
    if config.compile.enable:
        apply_compile(module, plan, config.compile.backend)
    # Sharding last of all that changes modules: it hooks what the others leave. One rank in full precision has
    # nothing to share or cast and stays plain.
    offload = config.training.enable_cpu_offload
    if mesh.size() > 1 or config.training.mixed_precision_param != "float32" or offload:
        data = DataPlan(
            plan.fsdp_units,
            config.training.mixed_precision_param,
            config.training.mixed_precision_reduce,
            _frees_parameters(recipe),
            offload,
        )
        apply_data_parallel(module, data_axes(mesh), data)
    # Materialised after sharding, so that each rank allocates and draws its shards only.
    module.to_empty(device="cpu" if offload else device)
    initialize(module, config.debug.seed, lambda name: recipe.spec.initial(name, recipe.args))
    return module


def _frees_parameters(recipe: Recipe) -> bool:
    """Under a pipeline each micro-batch would gather them again: kept there unless asked for."""
    policy = recipe.config.parallelism.fsdp_reshard_after_forward
    return policy == "always" or (policy == "default" and recipe.pipeline is None)


def _edges(recipe: Recipe, stage: int) -> tuple[Tensor, Tensor]:
    """What goes into a stage and comes out of it for one micro-batch, on meta."""
    training, dims = recipe.config.training, recipe.dims
    assert recipe.pipeline is not None
    rows = (recipe.pipeline.microbatch_size, training.seq_len // dims.cp)
    tokens = torch.empty(rows, dtype=torch.int64, device="meta")
    dtype = getattr(torch, training.mixed_precision_param)
    # With a gradient: that is how torch learns that one comes back.
    hidden = torch.empty((rows[0], rows[1] // dims.tp, recipe.args.dim), dtype=dtype, device="meta", requires_grad=True)
    logits = torch.empty((*rows, recipe.args.vocab_size), dtype=dtype, device="meta", requires_grad=True)
    return tokens if stage == 0 else hidden, logits if stage == len(recipe.pipeline.stages) - 1 else hidden
