"""What benchmarks/gpu.py runs: models of published width cut to few layers, and the techniques tried on them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtitan_lite.distributed.plans import Saving
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.models.llama3.args import Llama3Args
from torchtitan_lite.models.qwen3 import SPEC as QWEN3
from torchtitan_lite.models.qwen3.args import Qwen3Args


def _cuts(args: Any) -> Mapping[str, Any]:
    """Flavors by the number of layers that are left."""
    return {str(layers): replace(args, n_layers=layers) for layers in range(1, args.n_layers + 1)}


_TINY_MOE = Qwen3Args(64, 2, 4, 2, 64, head_dim=16, vocab_size=512, moe=MoEShape(8, 2))
# Named as model.spec = "gpu_cases:LLAMA".
LLAMA = replace(LLAMA3, name="Llama 3 8B's width", flavors=_cuts(LLAMA3.flavors["8B"]))
MIXTURE = replace(QWEN3, name="Qwen3 30B-A3B's width", flavors=_cuts(QWEN3.flavors["30B-A3B"]))
TINY_LLAMA = replace(LLAMA3, name="tiny Llama 3", flavors=_cuts(Llama3Args(64, 2, 4, 2, 192, vocab_size=512)))
TINY_MIXTURE = replace(QWEN3, name="tiny Qwen3 mixture", flavors=_cuts(_TINY_MOE))

CHUNKS = 4  # of 2,048 tokens: with fewer tokens products no longer hide what they read and write
COMPILE, CHUNKED = "--compile.enable=true", f"--training.loss_chunks={CHUNKS}"
_AC = "--activation_checkpoint."
_FLOAT8 = (
    COMPILE,
    '--model.converters=["quantize.linear.float8"]',
    # Keys and values are too narrow to gain, and losses keep the precision of their logits.
    '--quantize.linear.float8.filter_fqns=["output", "auto_filter_small"]',
)
_ROWWISE = "--quantize.linear.float8.recipe_name=rowwise"
_TINY_FLOAT8 = ("--quantize.linear.float8.emulate=true", '--quantize.linear.float8.filter_fqns=["output"]')


@dataclass(frozen=True)
class Case:
    """One run. model: name of a spec above. overrides: of the recipe. float8: whether products are."""

    name: str
    model: str
    overrides: tuple[str, ...]
    float8: bool = False

    def of_tiny(self) -> "Case":
        return replace(
            self, model=f"TINY_{self.model}", overrides=(*self.overrides, *(_TINY_FLOAT8 if self.float8 else ()))
        )


# In the order of worth: what no longer fits into the time is left out from the end.
CASES = (
    Case("compile", "LLAMA", (COMPILE,)),
    Case("compile, chunked loss", "LLAMA", (COMPILE, CHUNKED)),
    Case("float8 tensorwise", "LLAMA", _FLOAT8, float8=True),
    Case("float8 tensorwise, chunked loss", "LLAMA", (*_FLOAT8, CHUNKED), float8=True),
    Case("float8 rowwise", "LLAMA", (*_FLOAT8, _ROWWISE), float8=True),
    Case("float8 rowwise, chunked loss", "LLAMA", (*_FLOAT8, _ROWWISE, CHUNKED), float8=True),
    Case("eager", "LLAMA", ()),
    Case("mixture, compile", "MIXTURE", (COMPILE, CHUNKED)),
    Case("compile, checkpointing op", "LLAMA", (COMPILE, f"{_AC}mode=selective", f"{_AC}selective_ac_option=op")),
    Case("compile, checkpointing full", "LLAMA", (COMPILE, f"{_AC}mode=full")),
    Case("eager, chunked loss", "LLAMA", (CHUNKED,)),
    Case("mixture, experts in turn", "MIXTURE", (COMPILE, CHUNKED, "--debug.moe_force_load_balance=true")),
    Case("mixture, eager", "MIXTURE", ()),
)


def layers_that_fit(args: Any, tokens: int, memory: float) -> int:
    """Of one rank in bfloat16 without checkpointing, all logits at once, in 90% of `memory` bytes; 0 where none do.

    16 bytes a parameter (float32: weight, gradient, two moments); what blocks keep; 12 bytes a logit (bfloat16 and
    float32, with gradients); the largest unit gathered in bfloat16, with its gradient in bfloat16 and float32.
    """
    saving = Saving("all", width=2, fused_norms=True)

    def needed(layers: int) -> float:
        cut = replace(args, n_layers=layers)
        outside = 2 * args.vocab_size * args.dim
        unit = max(outside / 2, (cut.parameter_count() - outside) / layers)
        kept = layers * cut.saved_by_block(saving) * tokens
        return 16 * cut.parameter_count() + kept + 12 * tokens * args.vocab_size + 8 * unit

    return max((layers for layers in range(1, args.n_layers + 1) if needed(layers) <= 0.9 * memory), default=0)
