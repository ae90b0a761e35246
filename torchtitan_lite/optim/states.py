"""What an optimizer remembers of a parameter, on the ranks that hold the parameter, and how it is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

State = dict[str, Tensor]  # of one parameter
_ALL = slice(None)


def own(tensor: Tensor) -> Tensor:
    """This rank's part as a plain tensor that shares its memory."""
    part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    # torchao wraps what FSDP is to gather in float8.
    return getattr(part, "_tensor", part)


def rows_of(tensor: Tensor) -> Tensor:
    """This rank's part as rows [N, C] along the last dim."""
    part = own(tensor)
    return part.reshape(-1, part.shape[-1]) if part.dim() > 1 else part.reshape(1, -1)


def sharded_zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the parameter's shape, spread as it is."""
    if not isinstance(parameter, DTensor):
        return torch.zeros_like(parameter, dtype=dtype).detach()
    part = torch.zeros_like(own(parameter), dtype=dtype)
    spread = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    # Under CPU offload the mesh is of another device.
    return spread.to(parameter.device)


@dataclass(frozen=True)
class Kept:
    """Numbers of a state in `dtype`; they are read and written as float32."""

    dtype: torch.dtype = torch.float32

    def new(self, parameter: Tensor, key: str) -> State:
        """Zeros."""
        return {key: sharded_zeros(parameter, self.dtype)}

    def read(self, state: State, key: str, rows: slice = _ALL) -> Tensor:
        """[N, C] as from rows_of; of float32 the memory itself."""
        return rows_of(state[key])[rows].float()

    def write(self, state: State, key: str, value: Tensor, rows: slice = _ALL) -> None:
        if self.dtype != torch.float32:
            rows_of(state[key])[rows].copy_(value)
