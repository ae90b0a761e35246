"""Activation checkpointing: what a block's backward computes again instead of finding it in memory.

Bitwise the same gradients: the recomputation is the forward once more, on the same inputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_lite.config.techniques import ActivationCheckpoint
from torchtitan_lite.distributed.plans import ParallelPlan
from torchtitan_lite.distributed.units import block_patterns, matches
from torchtitan_lite.errors import UserError

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional

# What `op` keeps, TorchTitan's list: results that cost a matrix product or the network. max: of float8's scales.
KEPT = {
    _aten.mm.default,
    _aten.linear.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    _c10d.reduce_scatter_tensor.default,
    _c10d.all_to_all_single.default,
    _aten.max.default,
    torch._higher_order_ops.inductor_compiled_code,
}


def apply_activation_checkpoint(model: nn.Module, plan: ParallelPlan, section: ActivationCheckpoint) -> None:
    """Let the blocks of `model` recompute in their backward what `section` says, in place; modules keep their names.

    Raises UserError where section.per_op_sac_force_recompute_mm_shapes_by_fqns names what no block has.
    """
    # The process's, for all that it compiles; 1 is the compiler's own default.
    functorch.activation_memory_budget = section.memory_budget if section.mode == "memory_budget" else 1.0
    if section.mode in ("none", "memory_budget"):
        return
    option = "1" if section.mode == "full" else section.selective_ac_option
    contexts = partial(_contexts, _recomputed_shapes(model, plan, section)) if option == "op" else None
    for index, block in _blocks(model, plan):
        if option == "op" or (index + 1) % int(option) == 0:
            _checkpoint(block, contexts)


def _blocks(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[int, nn.Module]]:
    """The blocks with their places in the whole model, of which a pipeline stage may have some."""
    for pattern in block_patterns(plan):
        for name, block in model.get_submodule(pattern[:-2]).named_children():
            yield int(name), block


def _checkpoint(block: nn.Module, contexts: Callable[[], Any] | None) -> None:
    """contexts: what forward and recomputation run in, to keep some results; None keeps none."""
    more = {} if contexts is None else {"context_fn": contexts}
    # The forward, not a module around it: hooks of what is applied later (FSDP's) stay outside, names as they are. No
    # block draws random numbers.
    run = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **more)
    block.forward = run  # type: ignore[method-assign]


def _recomputed_shapes(model: nn.Module, plan: ParallelPlan, section: ActivationCheckpoint) -> set[torch.Size]:
    """Shapes of the second factors of the products that `op` never keeps."""
    weights = {
        name: weight
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 2
    }
    names = section.per_op_sac_force_recompute_mm_shapes_by_fqns
    for name in names:
        if not any(f".{weight}".endswith(f".{name}") for weight in weights):
            raise UserError(
                f'activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns: "{name}" is the end of no '
                f"matrix's name; some are {', '.join(list(weights)[1:4])}"
            )
    routers = [f"{plan.experts.moe}.router"] if plan.experts else []
    return {
        weight.T.shape
        for name, weight in weights.items()
        if any(f".{name}".endswith(f".{end}") for end in names) or any(matches(name, router) for router in routers)
    }


def _contexts(recomputed: set[torch.Size]) -> Any:
    """A forward's context and its recomputation's. Each counts its products, so that both keep the same ones."""
    products = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is _aten.mm.default:
            if args[1].shape in recomputed:
                return CheckpointPolicy.PREFER_RECOMPUTE
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            # What goes to the host is waited for: once is enough.
            keep = op in KEPT or (op is _aten._to_copy.default and _to_host(args[0], kwargs))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _to_host(source: Tensor, kwargs: Any) -> bool:
    return source.device.type != "cpu" and str(kwargs.get("device")) == "cpu"
