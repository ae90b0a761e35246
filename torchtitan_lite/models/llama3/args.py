"""Shapes of the Llama 3 family. No torch."""

from dataclasses import dataclass

from torchtitan_lite.distributed.plans import Saving
from torchtitan_lite.models.common import decoder_shape
from torchtitan_lite.models.common.rope_scaling import RopeScaling
from torchtitan_lite.models.common.saved import saved_by_block


@dataclass(frozen=True)
class Llama3Args:
    """As in decoder_shape.DecoderShape; heads share the width."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128_256
    max_seq_len: int = 131_072
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"n_heads {self.n_heads} must divide dim {self.dim} into an even head size, "
                f"n_kv_heads {self.n_kv_heads} must divide n_heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def qk_norm(self) -> bool:
        return False

    @property
    def moe(self) -> None:
        return None

    def parameter_count(self) -> int:
        return decoder_shape.parameter_count(self)

    def flops_by_module(self, seq_len: int) -> dict[str, float]:
        return decoder_shape.flops_by_module(self, seq_len)

    def saved_by_block(self, saving: Saving) -> float:
        return saved_by_block(self, saving)


_LLAMA_3_1 = RopeScaling(factor=8.0)
_LLAMA_3_2 = RopeScaling(factor=32.0)

# Published shapes: arXiv:2407.21783, table 3, and the model cards of Llama 3.1 and 3.2.
FLAVORS = {
    "debugmodel": Llama3Args(256, 6, 16, 16, 768, vocab_size=2048),
    "1B": Llama3Args(2048, 16, 32, 8, 8192, rope_scaling=_LLAMA_3_2, tied=True),
    "3B": Llama3Args(3072, 28, 24, 8, 8192, rope_scaling=_LLAMA_3_2, tied=True),
    "8B": Llama3Args(4096, 32, 32, 8, 14336, rope_scaling=_LLAMA_3_1),
    "70B": Llama3Args(8192, 80, 64, 8, 28672, rope_scaling=_LLAMA_3_1),
    "405B": Llama3Args(16384, 126, 128, 8, 53248, rope_scaling=_LLAMA_3_1),
    # Not published: twice the positions, so the slow frequencies are divided by twice as much.
    "405B-256K": Llama3Args(
        16384, 126, 128, 8, 53248, max_seq_len=262_144, rope_scaling=RopeScaling(factor=2 * _LLAMA_3_1.factor)
    ),
}
