"""States in eight bits, blocks of which have a scale each (arXiv:2110.02861), with torchao's table of values.

torchao's own AdamW8bit cuts a rank's part into blocks wherever they fall, so that its numbers are another mesh's no
more. Here blocks lie along the columns: codes are sharded as the parameter, scales likewise, and both are those of the
whole on every mesh.
"""

from collections.abc import Iterable
from functools import cache
from math import gcd

import torch
from torch import Tensor
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, scale_tensor

from torchtitan_lite.errors import UserError
from torchtitan_lite.optim.states import ALL, Kept, State, own, rows_of, sharded_zeros

_BLOCK, _SMALLEST = 256, 32  # numbers of a scale
_LEAST = 4096  # numbers of a tensor that is quantised, as in the paper
_NEVER_NEGATIVE = "exp_avg_sq"


class Int8(Kept):
    """uint8 codes in the place of numbers, and `KEY_scale`, float32; what has no blocks stays in float32."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def new(self, parameter: Tensor, key: str) -> State:
        if not (block := block_of(parameter)):
            return super().new(parameter, key)
        codes, scale = sharded_zeros(parameter, torch.uint8), sharded_zeros(parameter, torch.float32, block)
        return {key: codes, f"{key}_scale": scale}

    def read(self, state: State, key: str, rows: slice = ALL) -> Tensor:
        if (scale := state.get(f"{key}_scale")) is None:
            return super().read(state, key, rows)
        codes = rows_of(state[key])[rows]
        if not codes.numel():
            return codes.float()
        values, _ = _table(key, codes.device)
        return dequant_with_qmap(codes, values, rows_of(scale)[rows].flatten())  # type: ignore[no-any-return]

    def write(self, state: State, key: str, value: Tensor, rows: slice = ALL) -> None:
        if (scale := state.get(f"{key}_scale")) is None or not value.numel():
            return
        scales = rows_of(scale)[rows]
        scaled, largest = scale_tensor(value, value.numel() // scales.numel())
        # One search; torchao's, a kernel for each bit and more, is meant for a compiler.
        _, between = _table(key, value.device)
        rows_of(state[key])[rows].copy_(torch.bucketize(scaled, between, out_int32=True))
        scales.copy_(largest.view(scales.shape))


def block_of(parameter: Tensor) -> int:
    """Columns of a block; 0 where it is kept in float32: of vectors, small ones, and widths without a power of two. By
    the whole's shape, so on every mesh the same."""
    block = gcd(parameter.shape[-1], _BLOCK) if parameter.dim() > 1 else 0
    return block if block >= _SMALLEST and parameter.numel() >= _LEAST else 0


def require_blocks(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UserError where a rank's part of a matrix ends within a block."""
    for name, parameter in parameters:
        block, columns = block_of(parameter), own(parameter).shape[-1]
        if block and columns % block:
            raise UserError(
                f'optimizer.state_dtype = "int8": a rank has {columns} of the {parameter.shape[-1]} columns of {name}, '
                f'and a block of {block} has one scale; lower parallelism.tensor_parallel_degree, or take "bfloat16"'
            )


@cache
def _table(key: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the 256 codes, and the 255 bounds between them."""
    values = torch.tensor(create_dynamic_map(signed=key != _NEVER_NEGATIVE), device=device)
    return values, (values[:-1] + values[1:]) / 2
