"""Llama 3, 3.1 and 3.2 (Grattafiori et al., arXiv:2407.21783), text only."""

from typing import TYPE_CHECKING

from torchtitan_lite.models.llama3.args import FLAVORS, Llama3Args
from torchtitan_lite.models.llama3.parallelize import initial, plan
from torchtitan_lite.models.spec import ModelSpec

if TYPE_CHECKING:
    from torchtitan_lite.models.llama3.model import Llama3


def build(args: Llama3Args) -> "Llama3":
    from torchtitan_lite.models.llama3.model import Llama3

    return Llama3(args)


SPEC = ModelSpec("llama3", FLAVORS, build, initial, plan)
