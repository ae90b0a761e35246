"""Models small enough for a step in milliseconds, as from outside: `model.spec = "tests.tiny:SPEC"`."""

from dataclasses import replace
from pathlib import Path

from docs.examples.minimal_gpt import SPEC as GPT
from docs.examples.minimal_gpt import GPTArgs
from tests.outside_moe import SPEC as OUTSIDE_MOE
from torchtitan_lite.models.common.moe_shape import MoEShape
from torchtitan_lite.models.llama3 import SPEC as LLAMA3
from torchtitan_lite.models.llama3.args import Llama3Args
from torchtitan_lite.models.qwen3 import SPEC as QWEN3
from torchtitan_lite.models.qwen3.args import Qwen3Args

TINY = Llama3Args(64, 3, 4, 2, 96, vocab_size=384, max_seq_len=512)

SPEC = replace(LLAMA3, name="tiny", flavors={"tiny": TINY, "tied": replace(TINY, tied=True)})

# Enough layers for 8 stages, enough heads for 4 tensor-parallel ranks.
_DEEP_LLAMA = Llama3Args(64, 8, 8, 4, 96, vocab_size=384, max_seq_len=512)
_DEEP_QWEN = Qwen3Args(64, 8, 8, 4, 96, head_dim=16, vocab_size=384, max_seq_len=512)
DEEP_LLAMA = replace(
    LLAMA3, name="deep_llama", flavors={"untied": _DEEP_LLAMA, "tied": replace(_DEEP_LLAMA, tied=True)}
)
DEEP_QWEN = replace(QWEN3, name="deep_qwen", flavors={"untied": _DEEP_QWEN, "tied": replace(_DEEP_QWEN, tied=True)})
# Experts enough for 4 ranks, and a width that 3 divide; shared: with an expert that all tokens meet.
_MOE = Qwen3Args(64, 4, 8, 4, 48, head_dim=16, vocab_size=384, max_seq_len=512, moe=MoEShape(8, 2))
MOE = replace(
    QWEN3,
    name="tiny_moe",
    flavors={
        "routed": _MOE,
        "shared": replace(_MOE, moe=MoEShape(8, 2, num_shared_experts=1)),
        "greedy": replace(_MOE, moe=MoEShape(8, 9)),  # asks for more than there are
    },
)
# The families' own flavors with two layers and the debug model's width, for recipes to be stepped with.
_CUT = {"n_layers": 2, "dim": 256, "n_heads": 16, "n_kv_heads": 2, "vocab_size": 384}
CUT_LLAMA = replace(LLAMA3, flavors={name: replace(args, ffn_dim=768, **_CUT) for name, args in LLAMA3.flavors.items()})
CUT_QWEN = replace(
    QWEN3, flavors={name: replace(args, ffn_dim=64, head_dim=32, **_CUT) for name, args in QWEN3.flavors.items()}
)
MOE_GPT = OUTSIDE_MOE
SMALL_GPT = replace(GPT, name="small_gpt", flavors={"untied": GPTArgs(64, 4, 4, vocab_size=384, max_seq_len=512)})


def write_recipe(path: Path, corpus: Path, cache: Path, **sections: dict[str, object]) -> Path:
    """A recipe of 20 steps on the tiny model; `sections` add keys or replace them."""
    recipe: dict[str, dict[str, object]] = {
        "job": {"dump_folder": str(path.parent / "run")},
        "model": {"spec": "tests.tiny:SPEC", "flavor": "tiny"},
        "training": {
            "dataset": "text",
            "dataset_path": str(corpus),
            "seq_len": 32,
            "global_batch_size": 8,
            "steps": 20,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": 5e-3},
        "lr_scheduler": {"warmup_steps": 2, "total_steps": 20},
        "activation_checkpoint": {"mode": "none"},
        "metrics": {"log_freq": 1, "enable_tensorboard": False},
        "data": {"cache_folder": str(cache)},
    }
    for name, keys in sections.items():
        recipe.setdefault(name, {}).update(keys)
    lines = []
    for name, keys in recipe.items():
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
