"""Products of experts in float8 (arXiv:2209.05433), a scale for each row and column that is multiplied.

Every product, those of the backward among them, takes both its factors in float8 (e4m3). What has a scale of its own
is a vector along the dimension that is summed over: of the rows of tokens and of their gradients each, of each
expert's matrix each column or row, and for the gradient of a matrix each column of an expert's rows. Scales are powers
of two, so that rounding is relative: a number is rounded the same beside other ones, but where it is 2^15 times
smaller than the largest.

Shapes: R rows sorted by expert, E experts, K width that is summed over, N width of the product.
"""

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.config.techniques import GroupedFloat8
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.common.moe import Experts, GroupedSwiGLU
from torchtitan_lite.quantization.float8 import names_as_patterns

logger = logging.getLogger("torchtitan_lite")

_MULTIPLE = 16  # of which an expert's rows, and widths, must be, for the hardware
_CAPABILITIES = ((9, 0), (10, 0))  # torch's products are for these, and not for what is above
_TYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_TYPE).max
_LEAST = 1e-12  # of the largest number of a vector: without one its scale would be infinite
_KEY = "quantize.grouped_mm.float8"

Scaled = Callable[..., Tensor]


def apply_grouped_float8(model: nn.Module, section: GroupedFloat8, device: torch.device) -> None:
    """Let the experts of `model` (on meta) that section.fqns names multiply in float8, in place.

    Raises UserError where the device, torchao or a shape does not allow it.
    """
    scaled = None if section.emulate else _scaled_products(device)
    named, left = named_experts(model, section)
    for name, experts in named.items():
        if scaled is not None:
            _require_shapes(name, experts)
        experts.swiglu = EmulatedSwiGLU() if scaled is None else ScaledSwiGLU(scaled)
    if named:  # a stage of a pipeline may have none
        told = f"; not {', '.join(left)}: not in {_KEY}.fqns" if left else ""
        how = "emulated, " if section.emulate else ""
        logger.info(
            "float8    rowwise, %sproducts of %d layers of experts: %s%s",
            *(how, len(named), names_as_patterns(named), told),
        )


def require_named_experts(model: nn.Module, section: GroupedFloat8) -> None:
    """Raise UserError where one of section.fqns is in no name of experts of the whole `model`."""
    names = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    for each in section.fqns:
        if not any(each in name for name in names):
            some = f"some are {', '.join(names[:3])}" if names else "the model has none of models.common.moe"
            raise UserError(f'{_KEY}.fqns: "{each}" is in no name of experts; {some}')


def named_experts(model: nn.Module, section: GroupedFloat8) -> tuple[dict[str, Experts], list[str]]:
    """By name, the experts of `model` that multiply in float8; the names of those that do not."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    named = {name: module for name, module in experts.items() if any(each in name for each in section.fqns)}
    return named, [name for name in experts if name not in named]


class EmulatedSwiGLU(GroupedSwiGLU):
    """Rounds to float8 and multiplies in the type of the rows, which has room for every rounded number."""

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return _Emulated.apply(rows, weights, ends)  # type: ignore[no-any-return]


class ScaledSwiGLU(GroupedSwiGLU):
    """By torchao's grouped products, with zeros behind each expert's rows up to a multiple of what these take.

    scaled: as torchao's _to_fp8_rowwise_then_scaled_grouped_mm. No host sync.
    """

    def __init__(self, scaled: Scaled) -> None:
        super().__init__()
        self.scaled = scaled

    def forward(self, rows_RD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, w3_EDF: Tensor, ends_E: Tensor) -> Tensor:
        places_R, padded_ends_E, length = padded_places(len(rows_RD), ends_E)
        padded = _Spread.apply(rows_RD, places_R, length)
        return _Gathered.apply(super().forward(padded, w1_EDF, w2_EFD, w3_EDF, padded_ends_E), places_R)  # type: ignore[no-any-return]

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        # Of torchao's own padding there is none yet.
        return self.scaled(rows, weights, ends, out_dtype=rows.dtype, pad_token_groups_for_grouped_mm=False)


def padded_places(rows: int, ends_E: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where each row goes, int64 [rows]; where each expert's rows end then, int32 [E]; how many there are then.

    Every expert has a multiple of _MULTIPLE of them, and some: what a product makes of a group of none is not said.
    Rows past the last end stay past it.
    """
    experts = len(ends_E)
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    sizes_E = ((ends_E - starts_E + _MULTIPLE - 1) // _MULTIPLE).clamp(min=1) * _MULTIPLE
    padded_ends_E = sizes_E.cumsum(0, dtype=torch.int32)
    moved_E = torch.cat((padded_ends_E - sizes_E - starts_E, padded_ends_E[-1:] - ends_E[-1:]))
    places_R = torch.arange(rows, device=ends_E.device) + moved_E[_experts_of(rows, ends_E)]
    # The most that it can come to, whatever the ends are; a multiple itself, as the length of transposed rows.
    return places_R, padded_ends_E, (-(-rows // _MULTIPLE) + experts) * _MULTIPLE


class _Spread(torch.autograd.Function):
    """Rows at their places, each at one of its own, and zeros between them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(length, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Gathered(torch.autograd.Function):
    """The rows at some places. Its gradient is copied, not added up: no place is taken twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, grad.shape[1]).index_copy_(0, places, grad), None


class _Emulated(torch.autograd.Function):
    """torchao's scales and rounding; see the head of this file for what has a scale."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weights_EKN: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RK, weights_EKN, ends_E)
        return F.grouped_mm(_rounded_along(rows_RK, -1), _rounded_along(weights_EKN, -2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RK, weights_EKN, ends_E = ctx.saved_tensors
        weights_ENK = _rounded_along(weights_EKN, -1).transpose(-2, -1)
        d_rows = F.grouped_mm(_rounded_along(grad_RN, -1), weights_ENK, offs=ends_E)
        grad_RN, rows_RK = (_rounded_in_groups(each, ends_E) for each in (grad_RN, rows_RK))
        return d_rows, F.grouped_mm(grad_RN.t(), rows_RK, offs=ends_E).transpose(-2, -1), None


def _rounded_along(x: Tensor, dim: int) -> Tensor:
    """A scale for each vector along `dim`."""
    return _rounded(x, x.abs().amax(dim, keepdim=True))


def _rounded_in_groups(x_RC: Tensor, ends_E: Tensor) -> Tensor:
    """A scale for each column of each expert's rows. What those past the last end hold counts for no other."""
    expert_R = _experts_of(len(x_RC), ends_E)
    largest_EC = x_RC.new_zeros(len(ends_E) + 1, x_RC.shape[1])
    largest_EC = largest_EC.scatter_reduce(0, expert_R[:, None].expand_as(x_RC), x_RC.abs(), "amax")
    return _rounded(x_RC, largest_EC[expert_R])


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    """x as float8 has it, in x's own type: exactly that, since a scale is a power of two."""
    fits = (_LARGEST / largest.double().clamp(min=_LEAST)).float()
    scale = fits.log2().floor().exp2()
    # torch before 2.12 makes a NaN of what is too large.
    return ((x.float() * scale).clamp(-_LARGEST, _LARGEST).to(_TYPE).float() / scale).to(x.dtype)


def _experts_of(rows: int, ends_E: Tensor) -> Tensor:
    """int64 [rows]: the expert of each row; E past the last end."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)


def _scaled_products(device: torch.device) -> Scaled:
    if device.type != "cuda":
        raise UserError(f"{_KEY}: there are no such products on {device.type.upper()}; set {_KEY}.emulate = true")
    if torch.cuda.get_device_capability(device) not in _CAPABILITIES:
        raise UserError(
            f"{_KEY}: {torch.cuda.get_device_name(device)} has no grouped products in float8 (compute capability 9.0 "
            f"or 10.0); set {_KEY}.emulate = true, or take it out of model.converters"
        )
    takes: Mapping[str, Any]
    try:
        from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

        takes = signature(_to_fp8_rowwise_then_scaled_grouped_mm).parameters
    except ImportError:
        takes = {}
    if "pad_token_groups_for_grouped_mm" not in takes:
        raise UserError(
            f"{_KEY}: torchao {version('torchao')} does not have the prototype of torchao 0.18 that is used here; "
            f"install that, or set {_KEY}.emulate = true"
        )
    return _to_fp8_rowwise_then_scaled_grouped_mm  # type: ignore[no-any-return]


def _require_shapes(name: str, experts: Experts) -> None:
    for key, weight in experts.named_parameters(recurse=False):
        if any(size % _MULTIPLE for size in weight.shape[1:]):
            raise UserError(
                f"{_KEY}: {name}.{key} is {' x '.join(map(str, weight.shape[1:]))} for an expert, and float8 products "
                f"take multiples of {_MULTIPLE}; leave it out of {_KEY}.fqns, or set {_KEY}.emulate = true"
            )
