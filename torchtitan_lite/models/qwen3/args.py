"""Shapes of the Qwen3 family, dense and mixtures of experts. No torch."""

from dataclasses import dataclass

from torchtitan_lite.distributed.plans import Saving
from torchtitan_lite.models.common import decoder_shape
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.common.rope_scaling import RopeScaling
from torchtitan_lite.models.common.saved import saved_by_block


@dataclass(frozen=True)
class Qwen3Args:
    """As in decoder_shape.DecoderShape; the size of a head is free of the width. ffn_dim: of each expert where there
    are some."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    head_dim: int = 128
    vocab_size: int = 151_936
    max_seq_len: int = 40_960
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied: bool = False
    moe: MoEShape | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}, "
                f"head_dim {self.head_dim} must be even"
            )
        if self.moe and (self.dim % 8 or self.ffn_dim % 8):
            # Grouped products take rows of whole 16 bytes; bfloat16 has 2.
            raise ValueError(f"dim {self.dim} and ffn_dim {self.ffn_dim} of experts must be multiples of 8")

    @property
    def qk_norm(self) -> bool:
        return True

    @property
    def rope_scaling(self) -> RopeScaling | None:
        return None

    def parameter_count(self) -> int:
        return decoder_shape.parameter_count(self)

    def active_parameter_count(self) -> int:
        return decoder_shape.active_parameter_count(self)

    def flops_by_module(self, seq_len: int) -> dict[str, float]:
        return decoder_shape.flops_by_module(self, seq_len)

    def saved_by_block(self, saving: Saving) -> float:
        return saved_by_block(self, saving)


# Published shapes: arXiv:2505.09388, table 1, and the config.json of each model card.
FLAVORS = {
    "debugmodel": Qwen3Args(256, 6, 16, 8, 768, head_dim=32, vocab_size=2048),
    "0.6B": Qwen3Args(1024, 28, 16, 8, 3072, tied=True),
    "1.7B": Qwen3Args(2048, 28, 16, 8, 6144, tied=True),
    "4B": Qwen3Args(2560, 36, 32, 8, 9728, tied=True),
    "8B": Qwen3Args(4096, 36, 32, 8, 12288),
    "14B": Qwen3Args(5120, 40, 40, 8, 17408),
    "32B": Qwen3Args(5120, 64, 64, 8, 25600),
    # As much work for a token as debugmodel.
    "debugmodel_moe": Qwen3Args(256, 6, 16, 8, 384, head_dim=32, vocab_size=2048, moe=MoEShape(8, 2)),
    "30B-A3B": Qwen3Args(2048, 48, 32, 4, 768, moe=MoEShape(128, 8)),
    "235B-A22B": Qwen3Args(4096, 94, 64, 4, 1536, moe=MoEShape(128, 8)),
}
