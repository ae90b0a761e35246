"""Activation checkpointing: what a block's backward computes again instead of finding it in memory.

Bitwise the same gradients: the recomputation is the forward once more, on the same inputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_lite.config.techniques import ActivationCheckpoint
from torchtitan_lite.distributed.plans import ParallelPlan, keeps
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
    contexts = partial(_contexts, _recomputed_shapes(model, plan, section))
    for index, block in _blocks(model, plan):
        kept = keeps(section, index)
        if kept != "all":
            _checkpoint(block, contexts if kept == "op" else None)


def _blocks(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[int, nn.Module]]:
    """The blocks with their places in the whole model, of which a pipeline stage may have some."""
    for pattern in block_patterns(plan):
        for name, block in model.get_submodule(pattern[:-2]).named_children():
            yield int(name), block


def _checkpoint(block: nn.Module, contexts: Callable[[], Any] | None) -> None:
    """contexts: what forward and recomputation run in, to keep some results; None keeps none."""
    more: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        # No block draws random numbers.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **more, **kwargs)

    # The forward, not a module around it: hooks of what is applied later (FSDP's) stay outside, names as they are.
    block.forward = run


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
    """A forward's context and its recomputation's."""
    products = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is _aten.mm.default:
            if args[1].shape in recomputed:
                return CheckpointPolicy.PREFER_RECOMPUTE
            # torch before 2.13 asks again when it recomputes.
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            # What goes to the host is waited for: once is enough.
            keep = op in KEPT or (op is _aten._to_copy.default and _to_host(args[0], kwargs))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    forward, recomputation = create_selective_checkpoint_contexts(policy)
    return forward, _Recomputation(recomputation)


class _Recomputation(TorchDispatchMode):
    """torch's own, asked only for what may have been kept: it holds every operation to have come as often in the
    forward. The hooks of an FSDP unit within the block, which gather where nobody has yet, do not keep to that."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in KEPT or op is _aten._to_copy.default:
            return self._mode.__torch_dispatch__(op, types, args, kwargs)
        return op(*args, **(kwargs or {}))


def _to_host(source: Tensor, kwargs: Any) -> bool:
    return source.device.type != "cpu" and str(kwargs.get("device")) == "cpu"
