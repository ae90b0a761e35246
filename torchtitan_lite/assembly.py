"""From a model family and a mesh to something that trains.

The order in which techniques are applied stands here, each with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtitan_lite.config.resolution import uses_float8, uses_grouped_float8
from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan_lite.distributed.compile import apply_compile, compiled_loss
from torchtitan_lite.distributed.context_parallel import SequenceShare, apply_context_parallel
from torchtitan_lite.distributed.data_parallel import DataPlan, apply_data_parallel
from torchtitan_lite.distributed.expert_parallel import apply_expert_parallel
from torchtitan_lite.distributed.mesh import axis, data_axes, expert_axes, sequence_axes
from torchtitan_lite.distributed.parallel_dims import ParallelDims
from torchtitan_lite.distributed.pipeline_plan import PipelinePlan
from torchtitan_lite.distributed.plans import ParallelPlan, mixture_styles
from torchtitan_lite.distributed.tensor_parallel import Logits, apply_tensor_parallel, enable_async
from torchtitan_lite.distributed.units import matches, require_names, take_out_other_stages
from torchtitan_lite.models.common.initialize import initialize
from torchtitan_lite.models.spec import ModelSpec
from torchtitan_lite.optim.chunked_loss import apply_chunked_loss, loss_and_gradient
from torchtitan_lite.optim.groups import require_groups
from torchtitan_lite.optim.loss import token_loss_sum
from torchtitan_lite.trainable import Place, TokenLoss, TrainableModel, WholeModel

if TYPE_CHECKING:
    from torchtitan_lite.balance import Balance


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
    data = data_axes(mesh)
    experts, ep = expert_axes(mesh, recipe.dims.ep) if recipe.plan.experts else (data, None)
    axes = _Axes(mesh, data, experts, ep)
    share = SequenceShare(config.parallelism.context_parallel_rotate_method, at["cp"], recipe.dims.cp)
    place = Place(
        device,
        config.training.seq_len,
        share,
        config.training.loss_chunks > 1,
        _loss(config),
        counts=at["tp"] == at["cp"] == at["pp"] == 0,
        reports=at["tp"] == 0,
    )
    if pipeline is None:
        module = _spread(recipe, _built(recipe, None), axes, device)
        return WholeModel(
            module, place, _balance(recipe, [module], device), whole_gradients=not _frees_parameters(recipe)
        )
    from torchtitan_lite.staged import StagedModel

    stages = axis(mesh, "pp")
    assert stages is not None
    parts = [_spread(recipe, _built(recipe, stage), axes, device) for stage in pipeline.stages_of(at["pp"])]
    # The schedule last: it runs the stages as everything else has left them.
    return StagedModel(
        parts, place, _balance(recipe, parts, device), stages, pipeline, lambda stage: _edges(recipe, stage)
    )


@dataclass(frozen=True)
class _Axes:
    """mesh: all ranks. data: of parameters (see data_axes). experts, ep: of experts (see expert_axes)."""

    mesh: DeviceMesh
    data: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh | None


def _built(recipe: Recipe, stage: int | None) -> nn.Module:
    # Meta first: a 405B model has no room anywhere before it is sharded.
    with torch.device("meta"):
        module = recipe.spec.build(recipe.args)
    units = tuple(recipe.args.flops_by_module(recipe.config.training.seq_len))
    require_names(module, recipe.plan, units)
    require_groups(module, recipe.config.optimizer, recipe.plan.experts)
    if uses_float8(recipe.config):
        from torchtitan_lite.quantization.float8 import require_filters

        head = recipe.plan.head_in_loss(recipe.config.training.loss_chunks)
        require_filters(module, recipe.config.quantize.linear.float8, head)
    if uses_grouped_float8(recipe.config):
        from torchtitan_lite.quantization.grouped import require_named_experts

        require_named_experts(module, recipe.config.quantize.grouped_mm.float8)
    if stage is not None and recipe.pipeline is not None:
        # Stages before techniques: none of them then works on what another rank holds.
        take_out_other_stages(module, units, recipe.pipeline.stages[stage])
    return module


def _spread(recipe: Recipe, module: nn.Module, axes: _Axes, device: torch.device) -> nn.Module:
    """All techniques but the pipeline, on a module on meta; returns it materialised and initialised."""
    config, plan, mesh = recipe.config, recipe.plan, axes.mesh
    tensor, context = axis(mesh, "tp"), axis(mesh, "cp")
    # Wraps attention, which has no parameters: before the others see the modules that are there in the end.
    if context is not None and plan.context is not None:
        method, seq_len = config.parallelism.context_parallel_rotate_method, config.training.seq_len
        apply_context_parallel(module, context, plan.context, method, seq_len)
    if (head := plan.head_in_loss(config.training.loss_chunks)) is not None:
        part = compiled_loss(loss_and_gradient, config.compile)
        apply_chunked_loss(module, head, config.training.loss_chunks, part)
    # Layers that tensor parallelism then splits, and FSDP gathers in float8; experts that are then shared out.
    float8 = config.quantize.linear.float8
    if uses_float8(config):
        # Here, as below: torchao takes a second to import.
        from torchtitan_lite.quantization.float8 import apply_float8

        apply_float8(module, float8, device, head=head, compiled=config.compile.enable)
    if uses_grouped_float8(config):
        from torchtitan_lite.quantization.grouped import apply_grouped_float8

        apply_grouped_float8(module, config.quantize.grouped_mm.float8, device)
    # Splits matrices, before FSDP shards what is left of them.
    if tensor is not None and plan.tensor is not None:
        if config.parallelism.enable_async_tensor_parallel:
            enable_async(tensor)
        mixture = mixture_styles(plan.experts) if plan.experts else {}
        # First in order, where the first that matches counts, and last in value.
        styles = {**mixture, **plan.tensor.styles, **mixture}
        instead: dict[str, ParallelStyle] = {}
        if uses_float8(config):
            from torchtitan_lite.quantization.float8 import float8_gathers

            instead = float8_gathers(module, float8, styles, device)
        apply_tensor_parallel(module, tensor, styles, logits=_logits(config), instead=instead)
    if uses_float8(config):
        from torchtitan_lite.quantization.float8 import require_shapes

        require_shapes(module, float8)
    # Shares out the matrices that tensor parallelism has left apart, before FSDP shards each.
    if plan.experts is not None:
        _route(recipe, module, mesh, device)
        if axes.ep is not None:
            apply_expert_parallel(module, axes.ep, plan.experts, halves=config.moe.overlap_halves)
    # Around what the block has become; inside its graph, where the compiler knows it.
    apply_activation_checkpoint(module, plan, config.activation_checkpoint)
    # After what changes a block's graph, before FSDP, whose hooks stay outside the graphs.
    apply_compile(module, plan, config.compile)
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
            plan.experts.moe if plan.experts else None,
        )
        apply_data_parallel(module, axes.data, data, axes.experts)
    # Materialised after sharding, so that each rank allocates and draws its shards only.
    module.to_empty(device="cpu" if offload else device)
    if offload:
        _keep_buffers_on(module, device)
    initialize(module, config.debug.seed, lambda name: recipe.spec.initial(name, recipe.args))
    return module


def _loss(config: JobConfig) -> TokenLoss:
    """From what the model gives."""
    if config.training.loss_chunks > 1:
        return lambda output, labels: output
    return compiled_loss(token_loss_sum, config.compile)


def _logits(config: JobConfig) -> Logits:
    if config.training.loss_chunks > 1:
        return "none"
    return "gathered" if config.parallelism.disable_loss_parallel else "split"


def _route(recipe: Recipe, module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Give mixtures the recipe's rules, and what they must know of the ranks that hold other tokens of a sample."""
    # Here: a dense model does without.
    from torchtitan_lite.models.common.moe import apply_routing
    from torchtitan_lite.models.common.routing import Rules, Sharers

    assert recipe.plan.experts is not None
    config, seq_len, cp = recipe.config, recipe.config.training.seq_len, recipe.dims.cp
    factor = config.moe.capacity_factor
    rules = Rules(
        config.moe.aux_loss_coeff,
        config.moe.z_loss_coeff,
        None if factor == -1 else factor,
        config.debug.moe_force_load_balance,
    )
    sharing, sharers = sequence_axes(mesh), None
    if sharing is not None:
        method = config.parallelism.context_parallel_rotate_method
        # Tensor-parallel ranks hold parts of what is a context-parallel rank's, in order.
        positions = torch.cat([SequenceShare(method, rank, cp).positions(seq_len) for rank in range(cp)])
        sharers = Sharers(sharing.get_group(), positions.to(device))
    apply_routing(module, recipe.plan.experts.moe, rules, sharers)


def _balance(recipe: Recipe, parts: Sequence[nn.Module], device: torch.device) -> Balance | None:
    if recipe.plan.experts is None:
        return None
    from torchtitan_lite.balance import Balance

    whole = parts[0] if recipe.pipeline is None else _built(recipe, None)
    names = [name for name, _ in whole.named_modules() if matches(name, recipe.plan.experts.moe)]
    return Balance(parts, names, recipe.plan.experts.num_experts, recipe.config.moe.bias_update_rate, device)


def _keep_buffers_on(module: nn.Module, device: torch.device) -> None:
    """Parameters are brought to the device as they are needed; buffers stay where they are used."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


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
    if training.loss_chunks > 1:
        output = torch.empty((), device="meta", requires_grad=True)
    else:
        output = torch.empty((*rows, recipe.args.vocab_size), dtype=dtype, device="meta", requires_grad=True)
    return tokens if stage == 0 else hidden, output if stage == len(recipe.pipeline.stages) - 1 else hidden
