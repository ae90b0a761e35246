"""Shipped recipes for large models, each stepped once on a small mesh of its own kind, against one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.test_trainer import _run
from torchtitan_lite.config import load_config

FOLDER = Path(__file__).parents[2] / "train_configs"
TP = "tensor_parallel_degree"
CP = "context_parallel_degree"
PP = "pipeline_parallel_degree"
DP = "data_parallel_shard_degree"
EP = "expert_parallel_degree"
DEGREES = (DP, TP, CP, PP, EP)


@dataclass(frozen=True)
class Step:
    recipe: str
    degrees: dict[str, int]  # 1 where it is not said

    @property
    def ranks(self) -> int:
        ranks = 1
        for axis, degree in self.degrees.items():
            ranks *= 1 if axis == EP else degree
        return ranks

    def __str__(self) -> str:
        return f"{self.recipe}, {self.ranks} ranks"


STEPS = [
    Step("llama3_8b", {DP: 2}),
    Step("llama3_8b_128gpus", {DP: 4}),
    Step("llama3_70b", {DP: 2, TP: 2}),
    Step("llama3_405b", {DP: 2, PP: 2}),
    Step("llama3_405b_128k", {CP: 2, PP: 2}),
    Step("llama3_405b_256k", {CP: 2, TP: 2}),
    Step("qwen3_30b_a3b", {DP: 4, EP: 2}),
    Step("llama3_405b", {DP: 2, TP: 2, PP: 2}),
    Step("llama3_405b_256k", {CP: 2, TP: 2, PP: 2}),
    Step("llama3_405b_128k", {DP: 2, CP: 2, TP: 2, PP: 2}),
]


def _step(pool: RankPool, step: Step, corpus: Path, cache: Path, folder: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "model.name": "llama3",
        "model.spec": "tests.tiny:CUT_QWEN" if "qwen3" in step.recipe else "tests.tiny:CUT_LLAMA",
        "training.dataset_path": corpus,
        "training.seq_len": 64,
        "training.global_batch_size": 4,
        "training.local_batch_size": 1,
        "training.steps": 1,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 0,
        "data.cache_folder": cache,
        "checkpoint.enable": "false",
        "compile.enable": "false",
        "parallelism.enable_async_tensor_parallel": "false",
        "parallelism.pipeline_parallel_microbatch_size": 1,
        "metrics.enable_tensorboard": "false",
        "metrics.log_freq": 1,
        **{f"parallelism.{axis}": step.degrees.get(axis, 1) for axis in DEGREES},
        **more,
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    (line,) = _run(pool, step.ranks, FOLDER / f"{step.recipe}.toml", folder, *overrides)
    return line

_F8 = "quantize.linear.float8"
NAMED = "parallelism.module_fqns_per_model_part"

@pytest.mark.parametrize("step", [pytest.param(s, marks=pytest.mark.ranks(s.ranks)) for s in STEPS], ids=str)
def test_x(pool, corpus, cache, tmp_path, step):
    alone = Step(step.recipe, {})
    more = {}
    f8 = "llama" in step.recipe
    off = {f"{_F8}.enable_fsdp_float8_all_gather": "false", f"{_F8}.precompute_float8_dynamic_scale_for_fsdp": "false"} if f8 else {}
    if step.recipe == "llama3_405b" and PP in step.degrees:
        more = {NAMED: '[["tok_embeddings"],["layers.0"],["layers.1"],["norm","output"]]'}
    import time
    t=time.time()
    one = _step(pool, alone, corpus, cache, tmp_path / "one", **off, **{"activation_checkpoint.mode": "none"})
    t2=time.time()
    many = _step(pool, step, corpus, cache, tmp_path / "many", **more)
    t3=time.time()
    print(f"\nRES {step} {t2-t:.1f} {t3-t2:.1f} loss {one['loss']} {many['loss']/one['loss']-1:.2e} norm {one['grad_norm']} {many['grad_norm']/one['grad_norm']-1:.2e}")
