"""What an optimizer remembers of a parameter, on the ranks that hold the parameter, and how it is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

State = dict[str, Tensor]  # of one parameter
ALL = slice(None)


@dataclass(frozen=True)
class Kept:
    """Numbers of a state in `dtype`, rounded to the nearest; they are read and written as float32."""

    dtype: torch.dtype

    def new(self, parameter: Tensor, key: str) -> State:
        """Zeros."""
        return {key: sharded_zeros(parameter, self.dtype)}

    def read(self, state: State, key: str, rows: slice = ALL) -> Tensor:
        """Some of rows_of the state; in float32 the memory itself."""
        return rows_of(state[key])[rows].float()

    def write(self, state: State, key: str, value: Tensor, rows: slice = ALL) -> None:
        if self.dtype != torch.float32:
            rows_of(state[key])[rows].copy_(value)


def own(tensor: Tensor) -> Tensor:
    """This rank's part as a plain tensor that shares its memory."""
    part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    # torchao wraps what FSDP is to gather in float8.
    return getattr(part, "_tensor", part)


def rows_of(tensor: Tensor) -> Tensor:
    """This rank's part as rows [N, C] along the last dim, in the same memory."""
    part = own(tensor)
    return part.view(-1, part.shape[-1]) if part.dim() > 1 else part.view(1, -1)


def gradient_rows(parameter: Tensor) -> Tensor:
    """As rows_of the parameter; to be read only."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(parameter, DTensor):
        assert isinstance(grad, DTensor)
        assert grad.placements == parameter.placements, f"the parameter lies as {parameter.placements}"
    return rows_of(grad.contiguous())


def sharded_zeros(parameter: Tensor, dtype: torch.dtype, block: int = 1) -> Tensor:
    """Of the parameter's shape, spread as it is; block: of so many columns one number."""
    part = own(parameter)
    # Of a single number's shape there is no last one.
    zeros = torch.zeros(
        (*part.shape[:-1], *(length // block for length in part.shape[-1:])), dtype=dtype, device=part.device
    )
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty((*parameter.shape[:-1], parameter.shape[-1] // block), device="meta")
    mesh, placements = parameter.device_mesh, parameter.placements
    spread = DTensor.from_local(zeros, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    # Under CPU offload the mesh is of another device.
    return spread.to(parameter.device)
