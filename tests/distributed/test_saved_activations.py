"""What blocks keep for their backward: the formula against what is allocated."""

import ctypes
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.tiny import write_recipe
from torchtitan_lite.config.techniques import ActivationCheckpoint
from torchtitan_lite.data.loader import Batch
from torchtitan_lite.distributed.plans import keeps
from torchtitan_lite.models.llama3 import SPEC as LLAMA3

SEQ_LEN, ROWS, TIMES = 256, (2, 10), 3


class _InUse(ctypes.Structure):
    """mallinfo2(3); bytes in use are those of arenas and those mapped one by one."""

    _fields_ = [
        *((f"_{index}", ctypes.c_size_t) for index in range(4)),
        ("hblkhd", ctypes.c_size_t),
        *((f"_{index}", ctypes.c_size_t) for index in range(5, 7)),
        ("uordblks", ctypes.c_size_t),
        *((f"_{index}", ctypes.c_size_t) for index in range(8, 10)),
    ]


def _in_use() -> int:
    gc.collect()
    time.sleep(0.03)  # a collective's thread lets go of what it sent when it gets to it
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _InUse
    now = mallinfo()
    return int(now.uordblks + now.hblkhd)


def _kept(recipe: str, arguments: list[str], block: str) -> tuple[float, float]:
    """Bytes a token that a block's forward leaves allocated, and what the formula says. Of the difference between
    batches of two sizes: what is no activation (parameters that FSDP gathers, Python's objects) is in both."""
    from torchtitan_lite.assembly import Recipe, assemble
    from torchtitan_lite.distributed.environment import environment_ranks
    from torchtitan_lite.distributed.mesh import build_mesh
    from torchtitan_lite.preflight import plan_job

    rank, ranks = environment_ranks()
    plan = plan_job(recipe, arguments, ranks)
    parts = Recipe(plan.config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
    model = assemble(parts, build_mesh(plan.dims, "cpu"), torch.device("cpu"), rank)
    seen: list[int] = []
    module = model.parts[0].get_submodule(block)
    # The output is as large as the input, which was there before.
    module.register_forward_pre_hook(lambda *_: seen.append(_in_use()), prepend=True)
    module.register_forward_hook(lambda *_: seen.append(_in_use()))
    for rows in (ROWS[1], *ROWS * TIMES):  # libraries take their own memory in the first
        tokens = torch.randint(384, (rows, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
        model.forward_backward([Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())])
    grown = [after - before for before, after in zip(seen[2::2], seen[3::2], strict=True)]
    # The median: torch's flight recorder doubles its table when it is full, by 256 KiB at 512 collectives.
    kept = statistics.median(many - few for few, many in zip(grown[::2], grown[1::2], strict=True))
    saving = replace(plan.saving(), keeps=keeps(plan.config.activation_checkpoint, int(block.split(".")[-1])))
    per_token = plan.model_args.saved_by_block(saving)
    return kept / ((ROWS[1] - ROWS[0]) * SEQ_LEN / plan.dims.cp), per_token


NONE, OP, FULL = (
    ["--activation_checkpoint.mode=none"],
    ["--activation_checkpoint.selective_ac_option=op", "--activation_checkpoint.mode=selective"],
    ["--activation_checkpoint.mode=full"],
)
FORCED = [*OP, '--activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns=["feed_forward.w1"]']
TP, CP, EP = (f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "context", "expert"))
HEADS = "--parallelism.context_parallel_rotate_method=alltoall"
CASES: list[tuple[str, int, list[str]]] = [
    ("DEEP_LLAMA/untied", 1, NONE),
    ("DEEP_QWEN/untied", 1, FORCED),
    ("MOE/shared", 1, NONE),
    ("DEEP_LLAMA/untied", 2, [TP, *NONE]),
    ("DEEP_QWEN/untied", 2, [TP, *OP]),
    ("DEEP_LLAMA/untied", 2, [CP, *FULL]),
    ("DEEP_QWEN/untied", 2, [CP, *NONE]),
    ("DEEP_QWEN/untied", 2, [CP, HEADS, *OP]),
    ("MOE/routed", 2, [EP, *OP]),
    ("MOE/shared", 2, [TP, *NONE]),
]


@pytest.mark.parametrize(
    ("model", "ranks", "arguments"),
    [
        pytest.param(
            *case, marks=pytest.mark.ranks(case[1]), id=" ".join([case[0], *(a.split(".")[1] for a in case[2])])
        )
        for case in CASES
    ],
)
def test_the_formula_is_what_is_kept(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path, model: str, ranks: int, arguments: list[str]
) -> None:
    name, flavor = model.split("/")
    sections: dict[str, Any] = {
        "model": {"spec": f"tests.tiny:{name}", "flavor": flavor},
        "training": {"seq_len": SEQ_LEN, "local_batch_size": ROWS[1]},
        # Choices in turn: an even load, which the formula counts on.
        "debug": {"moe_force_load_balance": name == "MOE"},
        "data": {"document_mask": False},
    }
    recipe = write_recipe(tmp_path / "recipe.toml", corpus, cache, **sections)
    for measured, expected in pool.run(_kept, ranks, str(recipe), arguments, "layers.1"):
        assert abs(measured / expected - 1) < 0.05, (measured, expected)


def test_what_a_block_keeps_is_by_its_place() -> None:
    second = ActivationCheckpoint("selective", "2")
    assert [keeps(second, block) for block in range(4)] == ["all", "input", "all", "input"]
    for section, kept in ((("none", "2"), "all"), (("selective", "op"), "op"), (("full", "op"), "input")):
        assert keeps(ActivationCheckpoint(*section), 0) == kept
    assert keeps(ActivationCheckpoint("memory_budget"), 0) == "all"


def test_a_large_model_is_known_before_it_is_built() -> None:
    from torchtitan_lite.distributed.plans import Saving

    args, tokens = LLAMA3.flavors["8B"], 8192
    gib = [args.saved_by_block(Saving(kept, 2, fused_norms=True)) * tokens / 2**30 for kept in ("all", "op", "input")]
    assert [round(each, 3) for each in gib] == [1.282, 0.485, 0.062]
