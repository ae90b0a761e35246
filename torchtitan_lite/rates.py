"""What a run's times are held against: the FLOPs of its model and the peak rates of its device."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from torchtitan_lite.config.resolution import uses_float8, uses_grouped_float8
from torchtitan_lite.config.techniques import Float8, GroupedFloat8
from torchtitan_lite.distributed.plans import ExpertPlan
from torchtitan_lite.observability.hardware import mixed_peak_tflops, peak_tflops
from torchtitan_lite.observability.metrics import StepClock
from torchtitan_lite.preflight import JobPlan

logger = logging.getLogger("torchtitan_lite")


def step_clock(plan: JobPlan, device_name: str, settle: Callable[[], None]) -> StepClock:
    """A clock with the peaks that fit the plan's precision; says at the start which they are, or why there is none.
    settle: as of StepClock."""
    flops = sum(plan.model_args.flops_by_module(plan.config.training.seq_len).values())
    share = float8_flops(plan) / flops
    peaks, told = _peaks(device_name, plan.config.training.mixed_precision_param, share)
    logger.info("peak      %s", told)
    return StepClock(flops, plan.tokens_per_step, plan.dims.world_size, peaks, settle)


def float8_flops(plan: JobPlan) -> float:
    """Of a token's FLOPs those of products in float8; 0 where they are emulated."""
    linear, grouped = plan.config.quantize.linear.float8, plan.config.quantize.grouped_mm.float8
    layers = uses_float8(plan.config) and not linear.emulate
    experts = plan.parallel.experts if uses_grouped_float8(plan.config) and not grouped.emulate else None
    if not layers and experts is None:
        return 0.0
    with torch.device("meta"):
        model = plan.spec.build(plan.model_args)
    head = plan.parallel.head_in_loss(plan.config.training.loss_chunks)
    of_layers = _of_linear_layers(model, linear, head) if layers else 0.0
    return of_layers + (0.0 if experts is None else _of_experts(model, grouped, experts))


def _of_linear_layers(model: nn.Module, section: Float8, head: str | None) -> float:
    from torchtitan_lite.quantization.float8 import left_out

    left = left_out(model, section, head)
    layers = (module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in left)
    # Forward, gradient of the input, gradient of the weight: two for each of its elements.
    each = 4 if section.recipe_name == "rowwise_with_gw_hp" else 6
    return float(each * sum(layer.weight.numel() for layer in layers))


def _of_experts(model: nn.Module, section: GroupedFloat8, plan: ExpertPlan) -> float:
    """Of those that a token goes to."""
    from torchtitan_lite.quantization.grouped import named_experts

    named, _ = named_experts(model, section)
    weights = sum(weight.numel() for experts in named.values() for weight in experts.parameters())
    return 6.0 * weights * plan.top_k / plan.num_experts


def _peaks(device_name: str, precision: str, share: float) -> tuple[dict[str, float | None], str]:
    """StepClock's peaks, and what is said of them. share: of FLOPs in float8."""
    bfloat16 = peak_tflops(device_name)
    if bfloat16 is None:
        told = f"unknown for {device_name}: no MFU"
    elif precision != "bfloat16":
        bfloat16, told = None, f"of {device_name} is known in bfloat16, and this run is in {precision}: no MFU"
    else:
        told = f"mfu is over {bfloat16:,.0f} TFLOP/s, {device_name} in bfloat16"
    peaks = {"mfu": bfloat16}
    if share:
        peaks["mfu_float8"] = mixed = mixed_peak_tflops(device_name, share) if bfloat16 else None
        rate = "unknown" if mixed is None else f"{mixed:,.0f} TFLOP/s"
        told += f"; mfu_float8 over {rate}, with {share:.1%} of FLOPs in float8"
    return peaks, told
