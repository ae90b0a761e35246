"""Shape of a mixture of experts. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    """num_experts: feed-forwards of which each token goes to top_k. num_shared_experts: more of them, of the same
    width, to which all tokens go."""

    num_experts: int
    top_k: int
    num_shared_experts: int = 0
