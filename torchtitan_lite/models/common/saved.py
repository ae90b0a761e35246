"""What a decoder's block keeps of its forward for its backward, in eager mode. No torch.

All counts are of one token of the sequences that a rank works on: its context-parallel part of them, which
tensor-parallel ranks share.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan_lite.distributed.plans import Saving
    from torchtitan_lite.models.common.decoder_shape import DecoderShape


def saved_by_block(shape: DecoderShape, saving: Saving) -> float:
    """Bytes a token, the block's input among them and its output not. Expected ones where experts are, whose load
    varies."""
    if saving.keeps == "input":
        return saving.width * shape.dim / saving.tp
    states, numbers = _everything(shape, saving) if saving.keeps == "all" else _results(shape, saving)
    return saving.width * states + 4 * numbers


def _everything(shape: DecoderShape, saving: Saving) -> tuple[float, float]:
    """Elements of activations, and numbers that are of four bytes whatever the activations are."""
    tp, dim = saving.tp, shape.dim
    q, kv = (heads * shape.head_dim / tp for heads in (shape.n_heads, shape.n_kv_heads))
    # A norm keeps what it norms; where it is not one operation, also that scaled and not yet weighed.
    norm = 1 if saving.fused_norms else 2
    states = norm * 2 * dim / tp + dim + (norm * (q + kv) if shape.qk_norm else 0.0)
    states += 2 * q + 2 * kv if saving.cp == 1 else 3 * q + 2 * kv * _copies(shape, saving)
    numbers = 2 + shape.n_heads + (shape.n_heads + shape.n_kv_heads if shape.qk_norm else 0)
    if (moe := shape.moe) is None:
        return states + dim + 4 * shape.ffn_dim / tp, numbers / tp
    # Rows before and after the experts; scores, choices and weights, and where each choice goes and comes from.
    states += dim / tp + moe.top_k * (2 * dim + 4 * shape.ffn_dim) / tp
    numbers += moe.num_experts + 8 * moe.top_k + 1 + (dim if saving.width != 4 else 0)  # the router's own input
    if moe.num_shared_experts:
        states += (dim if tp > 1 else 0) + 4 * moe.num_shared_experts * shape.ffn_dim / tp
    return states, numbers / tp


def _results(shape: DecoderShape, saving: Saving) -> tuple[float, float]:
    """As _everything, of what `op` keeps: every second product, attention, what came from other ranks; and the
    block's input."""
    tp, dim, moe = saving.tp, shape.dim, shape.moe
    q, kv = (heads * shape.head_dim / tp for heads in (shape.n_heads, shape.n_kv_heads))
    products = _products(shape)
    again = {factor for name, factor in products if any(f".{name}".endswith(f".{end}") for end in saving.recomputed)}
    if moe is not None:  # the router's
        again.add((dim, moe.num_experts))
    counted = [(name, factor[1]) for name, factor in products if factor not in again]
    # Of a matrix that is split by rows each rank has a sum over its part, of the whole width.
    kept = sum(columns / (1 if name.endswith(("wo", "w2")) else tp) for name, columns in counted[::2])
    states = dim / tp + q + kept
    if tp > 1:  # sums that are scattered over ranks: attention's and the feed-forward's
        states += dim / tp * (2 if moe is None or moe.num_shared_experts else 1)
    if saving.cp > 1 and saving.exchanges_heads:
        states += 2 * q + 2 * kv * _copies(shape, saving)
    if moe is not None and saving.ep > 1:
        states += 2 * moe.top_k * dim / tp
    return states, shape.n_heads / tp


def _products(shape: DecoderShape) -> list[tuple[str, tuple[int, int]]]:
    """Matrix products of a token in the order of the forward: name of the matrix, its rows and columns."""
    dim, q, kv = shape.dim, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    products = [("attention.wq", (dim, q)), ("attention.wk", (dim, kv)), ("attention.wv", (dim, kv))]
    products.append(("attention.wo", (q, dim)))
    ffn, name = shape.ffn_dim, "feed_forward"
    if shape.moe is not None:
        ffn, name = ffn * shape.moe.num_shared_experts, "feed_forward.shared"
    if ffn:
        products += [(f"{name}.w1", (dim, ffn)), (f"{name}.w3", (dim, ffn)), (f"{name}.w2", (ffn, dim))]
    return products


def _copies(shape: DecoderShape, saving: Saving) -> float:
    """How many times a rank's own keys and values it attends to, over the ranks that share a sequence."""
    if not saving.exchanges_heads:
        return saving.cp
    own = shape.n_kv_heads // saving.tp
    return lcm(own, saving.cp) / own
