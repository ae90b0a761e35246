"""Float8 matrix products in training, through torchao (arXiv:2209.05433).

A linear layer casts its input, its weight and the gradient of its output to float8 and scales each by its largest
value: of the tensor (`tensorwise`) or of each row (`rowwise`). Parameters, their gradients and the optimizer stay as
they are.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtitan_lite.config.techniques import Float8
from torchtitan_lite.distributed.plans import TensorStyle
from torchtitan_lite.distributed.tensor_parallel import SEQUENCE, style_of
from torchtitan_lite.errors import UserError

logger = logging.getLogger("torchtitan_lite")

_MULTIPLE = 16  # of which rows and columns must be, for the hardware
_AUTO = "auto_filter_small"
# The last of FSDP's units, which small blocks before it join, and a model that is a single one.
_OUR_VIEWS = r"(FSDP(Embedding|Block), )*FSDPRMSNorm, FSDPFloat8Linear|FSDPDecoder"
_KEY = "quantize.linear.float8"


def apply_float8(
    model: nn.Module, section: Float8, device: torch.device, *, head: str | None = None, compiled: bool = False
) -> None:
    """Make the linear layers of `model` (on meta) compute in float8, in place, but for those that are filtered out.

    head: as of left_out. compiled: whether the model will be. Raises UserError where the device has no float8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    _require_hardware(section, device)
    left = left_out(model, section, head)
    if section.enable_fsdp_float8_all_gather or section.recipe_name == "tensorwise":
        config = Float8LinearConfig(
            enable_fsdp_float8_all_gather=section.enable_fsdp_float8_all_gather, emulate=section.emulate
        )
    else:
        recipe = Float8LinearConfig.from_recipe_name(section.recipe_name)
        # Its fields are derived from one another once; replace() would derive them again.
        object.__setattr__(recipe, "emulate", section.emulate)
        config = recipe
        if compiled:
            _round_where_eager_does()
    # Its layers return views of their products, where FSDP warns of operations in place: the models do none, and the
    # losses are functions of copies. Of other models, whose author may have to act, it is shown.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(({_OUR_VIEWS})\) returned a view tensor")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name not in left)
    done = [name for name, module in model.named_modules() if _is_float8(module)]
    reasons = "".join(f"; not {names_as_patterns(names)}: {reason}" for reason, names in _by_reason(left).items())
    logger.info("float8    %s, %d layers: %s%s", section.recipe_name, len(done), names_as_patterns(done), reasons)


def float8_gathers(
    model: nn.Module, section: Float8, styles: Mapping[str, TensorStyle], device: torch.device
) -> dict[str, ParallelStyle]:
    """By name, the modules of a converted model for which tensor parallelism can gather in float8, each with the style
    that does so. styles: as in TensorPlan.

    A module's input is gathered once for all its products: in float8 where all of them are.
    """
    if section.recipe_name != "tensorwise":
        return {}
    if device.type != "cuda":
        logger.info("float8    not the gathers of tensor parallelism: gloo has none in float8")
        return {}
    from torchao.float8.float8_tensor_parallel import (
        Float8ColwiseParallel,
        Float8RowwiseParallel,
        PrepareFloat8ModuleInput,
    )

    ways: dict[str, Callable[[], ParallelStyle]] = {
        "gather": lambda: PrepareFloat8ModuleInput(input_layouts=SEQUENCE, desired_input_layouts=Replicate()),
        "columns": Float8ColwiseParallel,
        "rows": lambda: Float8RowwiseParallel(output_layouts=SEQUENCE),
    }
    found = {}
    for name, module in model.named_modules():
        layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
        if layers and all(map(_is_float8, layers)) and (way := ways.get(style_of(name, styles) or "")):
            found[name] = way()
    return found


def require_shapes(model: nn.Module, section: Float8) -> None:
    """Raise UserError where a rank's part of a float8 layer has a shape that the hardware cannot take."""
    if section.emulate:
        return
    for name, module in model.named_modules():
        if _is_float8(module):
            weight = module.weight
            rows, columns = (weight.to_local() if isinstance(weight, DTensor) else weight).shape
            if rows % _MULTIPLE or columns % _MULTIPLE:
                raise UserError(
                    f"{_KEY}: {name} is {rows} x {columns} on a rank, and float8 products take multiples of "
                    f'{_MULTIPLE}; add "{name.rpartition(".")[2]}" to {_KEY}.filter_fqns'
                )


def precompute_scales(parts: Iterable[nn.Module]) -> None:
    """Scales of all weights for the next gathers, in one all-reduce; after each change of the parameters."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    for part in parts:
        precompute_float8_dynamic_scale_for_fsdp(part)


def require_filters(model: nn.Module, section: Float8, head: str | None = None) -> None:
    """Raise UserError where a filter names no layer of the whole `model`, and where they leave none. head: as of
    left_out."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for each in section.filter_fqns:
        if each != _AUTO and not any(each in name for name in layers):
            raise UserError(
                f'{_KEY}.filter_fqns: "{each}" is in no linear layer\'s name; some are {", ".join(layers[:3])}'
            )
    if left_out(model, section, head).keys() >= set(layers):
        raise UserError(f"{_KEY}.filter_fqns = {section.filter_fqns} leaves no layer to compute in float8; shorten it")


def left_out(model: nn.Module, section: Float8, head: str | None = None) -> dict[str, str]:
    """Linear layers that stay as they are, each with the reason. head: the module that is one with the loss, or is to
    become it; None for none."""
    from torchao.float8 import _auto_filter_for_recipe

    filters = [name for name in section.filter_fqns if name != _AUTO]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    large = _auto_filter_for_recipe(section.recipe_name, []) if _AUTO in section.filter_fqns else None
    left = {}
    for name, module in layers.items():
        if (named := next((each for each in filters if each in name), None)) is not None:
            left[name] = f'"{named}" in filter_fqns'
        elif large is not None and not large(module, name):
            left[name] = f"too small to gain ({_AUTO})"
    if head is not None and getattr(model, head) is not None:  # a pipeline's other stages have none
        left.setdefault(head, "in one with the loss (training.loss_chunks)")
    return left


def _require_hardware(section: Float8, device: torch.device) -> None:
    if section.emulate:
        return
    if device.type != "cuda":
        logger.warning(
            "float8    products in float8 are computed one number at a time on %s, some hundred times slower; set "
            "%s.emulate = true",
            *(device.type.upper(), _KEY),
        )
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{_KEY}: {torch.cuda.get_device_name(device)} has no float8 products (compute capability 8.9 or more); "
            f"set {_KEY}.emulate = true, or take it out of model.converters"
        )


def _round_where_eager_does() -> None:
    """Otherwise scales of rows are of numbers that fused norms have not rounded yet, and can become NaN on CUDA
    (pytorch/pytorch#150859)."""
    from torch._inductor import config

    config.emulate_precision_casts = True


def _is_float8(module: nn.Module) -> bool:
    return type(module).__name__ == "Float8Linear"


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def names_as_patterns(names: Iterable[str]) -> str:
    """Blocks' layers under one name."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
