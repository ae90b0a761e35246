"""Initial weights by (seed, parameter name) alone, the same bits under every sharding.

A parameter is drawn in blocks of whole rows, each from a generator of its own, so that a rank draws only
the blocks that its shard touches: a 405B model on 512 ranks costs each of them some 0.8B numbers. Of stacked
matrices [experts, rows, columns] each is drawn as a parameter of its own, `name.0` and on.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan_lite.models.spec import Init

_BLOCK = 1 << 20  # elements; part of what defines the weights, so never to be changed


def initialize(model: nn.Module, seed: int, rule: Callable[[str], Init]) -> None:
    """Fill every parameter of `model` (materialised, plain or DTensor) from `rule` by its name; buffers are zeros."""
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            _fill(parameter, name, seed, rule(name))


def initial_rows(name: str, shape: torch.Size, seed: int, init: Init, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the full parameter: float32 on the CPU, shape [stop - start, *shape[1:]]."""
    row = shape[1:].numel()
    if init.std == 0.0:
        return torch.full((stop - start, *shape[1:]), init.mean)
    per_block = max(1, _BLOCK // row)
    first = start // per_block

    def drawn(block: int) -> Tensor:
        rows = min(per_block, shape[0] - block * per_block)
        values = torch.empty((rows, *shape[1:]), dtype=torch.float32)
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        if init.cutoff is None:
            return values.normal_(init.mean, init.std, generator=generator)
        reach = init.cutoff * init.std
        return nn.init.trunc_normal_(values, init.mean, init.std, init.mean - reach, init.mean + reach, generator)

    blocks = range(first, -(-stop // per_block))
    # Normals are drawn on one core; of a cut off one torch itself spreads what takes long over all of them.
    threads = torch.get_num_threads() if init.cutoff is None and len(blocks) > 1 else 1
    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        values = torch.cat(list((map if pool is None else pool.map)(drawn, blocks)))
    offset = first * per_block
    return values[start - offset : stop - offset]


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _fill(parameter: Tensor, name: str, seed: int, init: Init) -> None:
    local, shape, offset = parameter, parameter.shape, (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    if local.numel() == 0:
        return
    if local.dim() == 3:
        for index, matrix in enumerate(local, start=offset[0]):
            _fill_part(matrix, f"{name}.{index}", shape[1:], seed, init, offset[1:])
    else:
        _fill_part(local, name, shape, seed, init, offset)


def _fill_part(local: Tensor, name: str, shape: torch.Size, seed: int, init: Init, offset: tuple[int, ...]) -> None:
    """Fill `local`, the part at `offset` of a parameter of that shape."""
    values = initial_rows(name, shape, seed, init, offset[0], offset[0] + local.shape[0])
    for dim in range(1, local.dim()):
        values = values.narrow(dim, offset[dim], local.shape[dim])
    local.copy_(values)
