"""The debug model, late by some milliseconds a micro-batch, to see that a comparison finds it:

    torchtitan-lite compare train_configs/llama3_debug.toml --vary model.spec=,tests.compare.delayed:SPEC \
        --steps 30 --repeats 8 --nproc 1
"""

import os
import time
from dataclasses import replace
from typing import Any

from torchtitan_lite.models.llama3 import SPEC as LLAMA3

_MILLISECONDS = float(os.environ.get("DELAY_MS", "10"))


def _late(args: Any) -> Any:
    model = LLAMA3.build(args)
    model.register_forward_pre_hook(lambda *_: time.sleep(_MILLISECONDS / 1e3))
    return model


SPEC = replace(LLAMA3, build=_late)
