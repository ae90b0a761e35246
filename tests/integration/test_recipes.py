"""Recipes for large models: what their headers say, and a step of each, cut to two layers, against one process."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from docs.quote import header, large_recipes
from tests.ranks import RankPool
from tests.test_trainer import _run
from torchtitan_lite.config import load_config
from torchtitan_lite.distributed.parallel_dims import fewest_ranks
from torchtitan_lite.preflight import plan_job

FOLDER = Path(__file__).parents[2] / "train_configs"
# Axes whose degrees multiply to the world size, and experts' within them, by the keys' beginnings.
AXES = ("data_parallel_shard", "context_parallel", "tensor_parallel", "pipeline_parallel")
EXPERTS = "expert_parallel"


@dataclass(frozen=True)
class Step:
    """A recipe on a mesh of this size, a degree for each of AXES. more: overrides that this mesh needs."""

    recipe: str
    mesh: tuple[int, int, int, int]
    experts: int = 1
    more: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return prod(self.mesh)

    def degrees(self) -> dict[str, int]:
        return {**dict(zip(AXES, self.mesh, strict=True)), EXPERTS: self.experts}

    def __str__(self) -> str:
        return f"{self.recipe}, {' x '.join(map(str, self.mesh))}"


# Of two layers the interleaved stages, two a rank, take what they can: embedding, a layer, a layer, output.
FOUR_STAGES = (
    '--parallelism.module_fqns_per_model_part=[["tok_embeddings"],["layers.0"],["layers.1"],["norm","output"]]',
)
STEPS = [
    # One whose blocks are compiled, without the kernels.
    Step("llama3_8b", (2, 1, 1, 1), more=("--compile.enable=true", "--compile.backend=aot_eager")),
    Step("llama3_8b_128gpus", (4, 1, 1, 1)),
    Step("llama3_70b", (2, 1, 2, 1)),
    Step("qwen3_30b_a3b", (4, 1, 1, 1), experts=2),
    # On as many ranks as the pool has by default; each axis is in one of them.
    Step("llama3_405b", (2, 1, 1, 2), more=FOUR_STAGES),
    Step("llama3_405b_128k", (1, 2, 1, 2)),
    Step("llama3_405b_256k", (1, 2, 2, 1)),
    # On all their axes.
    Step("llama3_405b", (2, 1, 2, 2), more=FOUR_STAGES),
    Step("llama3_405b_128k", (2, 2, 2, 2)),
    Step("llama3_405b_256k", (1, 2, 2, 2)),
]

CUT = (
    "--model.name=llama3",  # the default: the spec takes its place
    "--training.seq_len=64",
    "--training.global_batch_size=4",
    "--training.local_batch_size=1",
    "--parallelism.pipeline_parallel_microbatch_size=1",
    "--training.steps=1",
    "--lr_scheduler.warmup_steps=0",
    "--training.mixed_precision_param=float32",
    "--checkpoint.enable=false",
    "--metrics.enable_tensorboard=false",
    # A compiler's minute, and memory that CUDA alone has.
    "--compile.enable=false",
    "--parallelism.enable_async_tensor_parallel=false",
    "--quantize.linear.float8.emulate=true",
)
# One process shards nothing that it could gather, and keeps all results.
ALONE = (
    "--activation_checkpoint.mode=none",
    "--quantize.linear.float8.enable_fsdp_float8_all_gather=false",
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=false",
)


def _step(pool: RankPool, step: Step, corpus: Path, cache: Path, folder: Path, *more: str) -> dict[str, Any]:
    family = "QWEN" if step.recipe.startswith("qwen3") else "LLAMA"
    degrees = [f"--parallelism.{axis}_degree={degree}" for axis, degree in step.degrees().items()]
    where = (f"--training.dataset_path={corpus}", f"--data.cache_folder={cache}")
    overrides = (*CUT, f"--model.spec=tests.tiny:CUT_{family}", *where, *degrees, *more)
    (line,) = _run(pool, step.ranks, FOLDER / f"{step.recipe}.toml", folder, *overrides)
    return line


@pytest.mark.parametrize("step", [pytest.param(step, marks=pytest.mark.ranks(step.ranks)) for step in STEPS], ids=str)
def test_a_step_of_the_cut_recipe_is_that_of_one_process(
    pool: RankPool, corpus: Path, cache: Path, tmp_path: Path, step: Step
) -> None:
    one = _step(pool, Step(step.recipe, (1, 1, 1, 1)), corpus, cache, tmp_path / "one", *ALONE)
    found = _step(pool, step, corpus, cache, tmp_path / "mesh", *step.more)
    # Under context parallelism a rank scales its own part of a sequence to float8.
    limit = 2e-5 if step.degrees()["context_parallel"] > 1 else 1e-6
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(one[key], rel=limit), key


def test_every_axis_of_every_recipe_is_stepped() -> None:
    assert {step.recipe for step in STEPS} == {recipe.stem for recipe in large_recipes()}
    for recipe in large_recipes():
        parallelism = load_config(recipe).parallelism
        asked = {axis for axis in (*AXES, EXPERTS) if getattr(parallelism, f"{axis}_degree") > 1}
        assert asked in [
            {axis for axis, degree in step.degrees().items() if degree > 1}
            for step in STEPS
            if step.recipe == recipe.stem
        ], recipe


@pytest.mark.parametrize("recipe", large_recipes(), ids=lambda recipe: recipe.stem)
def test_the_header_of_a_recipe_says_what_it_is(recipe: Path) -> None:
    told = header(recipe)
    assert list(told) == ["Hardware", "World size", "Shows", "Published", "Start"]
    ranks = int(told["World size"])
    # What `config check` takes it for.
    assert fewest_ranks(load_config(recipe).parallelism) == ranks
    assert told["Hardware"].startswith(f"{ranks} H100 ")
    assert recipe.name in told["Start"]
    nodes = f"NNODES={ranks // 8} RDZV_ENDPOINT=" if ranks > 8 else "./run_train.sh"
    assert told["Start"].startswith(nodes)
    # Nothing that it sets is without effect, and no rank idles for want of micro-batches.
    assert plan_job(recipe, (), ranks).warnings() == []
