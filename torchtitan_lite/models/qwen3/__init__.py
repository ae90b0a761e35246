"""Qwen3 (Yang et al., arXiv:2505.09388): the decoder with normed queries and keys, dense or a mixture of experts."""

from typing import TYPE_CHECKING

from torchtitan_lite.models.common.decoder_shape import initial, plan
from torchtitan_lite.models.qwen3.args import FLAVORS, Qwen3Args
from torchtitan_lite.models.spec import ModelSpec

if TYPE_CHECKING:
    from torchtitan_lite.models.common.decoder import Decoder


def build(args: Qwen3Args) -> "Decoder":
    from torchtitan_lite.models.common.decoder import Decoder

    return Decoder(args)


SPEC = ModelSpec("qwen3", FLAVORS, build, initial, plan)
