"""Llama 3, 3.1 and 3.2 (Grattafiori et al., arXiv:2407.21783), text only: the dense decoder as it stands."""

from typing import TYPE_CHECKING

from torchtitan_lite.models.common.decoder_shape import initial, plan
from torchtitan_lite.models.llama3.args import FLAVORS, Llama3Args
from torchtitan_lite.models.spec import ModelSpec

if TYPE_CHECKING:
    from torchtitan_lite.models.common.decoder import Decoder


def build(args: Llama3Args) -> "Decoder":
    from torchtitan_lite.models.common.decoder import Decoder

    return Decoder(args)


SPEC = ModelSpec("llama3", FLAVORS, build, initial, plan)
