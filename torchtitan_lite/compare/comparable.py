"""What two runs have in common, and so what may be said of their difference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan_lite.compare.runs import Run

Effect = Literal["bits", "rounding", "course"]

# What a key that differs does to the loss, by key or else by section: nothing ("bits"), another order of additions
# ("rounding"), or another course of training. What is in neither table is of the last kind.
_EFFECTS: dict[str, Effect] = {
    "activation_checkpoint": "bits",
    "checkpoint": "bits",
    "checkpoint.initial_load_path": "course",
    "checkpoint.initial_load_model_only": "course",
    "checkpoint.exclude_from_loading": "course",
    "comm": "bits",
    "compile": "rounding",
    "data.cache_folder": "bits",
    "debug.detect_anomaly": "bits",
    "debug.deterministic": "rounding",
    "debug.replay_steps": "bits",
    "elastic": "bits",
    "faults": "bits",
    "job": "bits",
    "metrics": "bits",
    "moe.overlap_halves": "rounding",
    "optimizer.implementation": "rounding",
    "parallelism": "rounding",
    "profiling": "bits",
    "training.enable_cpu_offload": "rounding",
    "training.gc_freq": "bits",
    "training.local_batch_size": "rounding",
    "training.loss_chunks": "rounding",
    "validation": "bits",
    "world_size": "rounding",
}
# Losses of twelve steps lie so far apart, relatively, at most (docs/parallelism.md), and further the longer training
# feeds them back (docs/compare.md).
_PARITY_STEPS = 12
_FLOAT32, _FLOAT8, _BFLOAT16 = 2e-6, 2e-4, 5e-4


@dataclass(frozen=True)
class Ground:
    """What two sides share. weights: of the first step, for runs in pairs. along: what losses are held at equal.
    limit: by step, how far losses may lie apart, relatively; None where curves may differ. why: the reason for it.
    told: what is not the same."""

    data: bool
    tokens_per_step: bool
    model: bool
    weights: bool
    hardware: bool
    along: Literal["steps", "tokens", "flops"]
    limit: Callable[[int], float] | None
    why: str
    told: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        names = ("data", "tokens_per_step", "model", "weights", "hardware")
        return {**{name: getattr(self, name) for name in names}, "told": list(self.told)}


def ground(a: Run, b: Run, config: Mapping[str, Mapping[str, Any]], derived: Mapping[str, Any]) -> Ground:
    """config, derived: how the two sides' configs differ, as recipe_diff.parted tells; debug.seed is in config only
    where no runs are in pairs."""
    x, y = a.identity, b.identity
    model = x.get("model") == y.get("model")
    # A GPU's name says how fast it is; a CPU's does not.
    places = [f"{run.device} of {run.host}" if run.device == "CPU" and run.host else run.device for run in (a, b)]
    hardware = a.device == b.device and (a.device != "CPU" or None in (a.host, b.host) or a.host == b.host)
    tokens = a.tokens_per_step == b.tokens_per_step
    told = [
        f"the {what} is another"
        for what, key in (("tokenizer", "tokenizer"), ("data", "data"), ("mixture", "data.mixture_weights"))
        if x.get(key) != y.get(key)
    ]
    data = not told
    if not model:
        told.append("the model is another: losses are compared at equal FLOPs")
    elif not tokens:
        told.append(
            f"a step has {a.tokens_per_step:,} and {b.tokens_per_step:,} tokens: losses are compared at equal tokens"
        )
    if x.get("training.seq_len") != y.get("training.seq_len"):
        told.append("samples have another length, and the loss of a token depends on what stands before it")
    if not hardware:
        told.append(f"they ran on {places[0]} and {places[1]}")
    keys = [f"{section}.{key}" for section, pairs in config.items() for key in pairs]
    keys += [name for name in derived if "." in name or name == "world_size"]
    if seeds := "debug.seed" in keys:
        told.append("their seeds differ, and so do weights and samples")
    loaded = any(_effect(key) == "course" for key in keys if key.startswith("checkpoint."))
    limit, why = _limit(a, b, keys)
    if not (data and tokens and model):
        limit, why = None, "; ".join(told)
    return Ground(
        data=data,
        tokens_per_step=tokens,
        model=model,
        weights=model and not loaded and not seeds,
        hardware=hardware,
        along="steps" if model and tokens else "tokens" if model else "flops",
        limit=limit,
        why=why,
        told=tuple(told),
    )


def _limit(a: Run, b: Run, keys: list[str]) -> tuple[Callable[[int], float] | None, str]:
    effects = {key: _effect(key) for key in keys if key != "debug.seed"}
    course = [key for key, effect in effects.items() if effect == "course"]
    reasons = [f"{_listed(course)} may change them"] if course else []
    if "debug.seed" in keys:
        reasons.append("their seeds differ")
    if reasons:
        return None, ", and ".join(reasons)
    rounding = [key for key, effect in effects.items() if effect == "rounding"]
    for side in (a, b):
        if side.device != "CPU" and not side.described.config["debug"]["deterministic"]:
            rounding.append(f"kernels of {side.device}")
    if a.described.config["compile"]["enable"] and any(key.startswith("activation_checkpoint.") for key in effects):
        rounding.append("what the compiler fuses")
    if a.versions.get("torch") != b.versions.get("torch"):
        rounding.append("the version of torch")
    if not rounding:
        return (lambda _: 0.0), "nothing that differs is in the numbers" if effects else "the recipes are the same"
    most = max(_precision(side) for side in (a, b))
    return (
        lambda step: most * max(1.0, step / _PARITY_STEPS)
    ), f"{_listed(list(dict.fromkeys(rounding)))} only changes rounding"


def _precision(run: Run) -> float:
    config = run.described.config
    if config["training"]["mixed_precision_param"] != "float32" or config["optimizer"]["state_dtype"] != "float32":
        return _BFLOAT16
    return _FLOAT8 if config["model"]["converters"] else _FLOAT32


def _effect(key: str) -> Effect:
    while key:
        if key in _EFFECTS:
            return _EFFECTS[key]
        key = key.rpartition(".")[0]
    return "course"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
