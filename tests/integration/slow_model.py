"""The tiny model with forwards that last a while: `model.spec = "tests.integration.slow_model:SPEC"`."""

import time
from dataclasses import replace
from typing import Any

from tests.tiny import SPEC as TINY

SECONDS = 0.2


def _build(*args: Any, **kwargs: Any) -> Any:
    model = TINY.build(*args, **kwargs)
    model.register_forward_pre_hook(lambda *_: time.sleep(SECONDS))
    return model


SPEC = replace(TINY, build=_build)
