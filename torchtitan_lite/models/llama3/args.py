"""Shapes of the Llama 3 family, and what follows from them: parameters and FLOPs. No torch."""

from dataclasses import dataclass

from torchtitan_lite.models.common.rope_scaling import RopeScaling


@dataclass(frozen=True)
class Llama3Args:
    """dim: width. n_heads, n_kv_heads: query heads and the key/value heads they share (GQA).
    ffn_dim: width inside SwiGLU. tied: the output matrix is the embedding."""

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

    def parameter_count(self) -> int:
        """Elements of all parameters; a tied output counts once."""
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv_dim
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return embeddings + self.n_layers * layer + self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a causal sequence of `seq_len`.

        6 for each parameter that multiplies a token (Kaplan et al., arXiv:2001.08361): all but the
        embedding table, which is looked up, unless it is the output matrix too. Attention: scores and
        values are 2 x 2 x dim x seq_len forward, three times that with the backward, half of it causal.
        """
        lookup_only = 0 if self.tied else self.vocab_size * self.dim
        multiplied = self.parameter_count() - lookup_only
        return 6 * multiplied + 6 * self.n_layers * self.dim * seq_len


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
}
