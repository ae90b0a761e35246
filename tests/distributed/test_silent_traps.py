"""What torch gets wrong without an error, each with a test that fails where the product steps into it."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchtitan_lite
from tests.checkpoint.reading import flip_a_bit
from tests.distributed.test_parity import alone as alone  # the fixture
from tests.distributed.test_parity import mutant_named
from tests.parity.mutate import caught_by
from tests.parity.runner import Alone
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage

PACKAGE = Path(torchtitan_lite.__file__).parent


@pytest.mark.parametrize(
    "name",
    [
        "zero_bubble_frees_parameters",  # zero-bubble schedules with FSDP2 that frees parameters
        "weights_by_shard",  # DTensor's random numbers: the same on every rank, others for every sharding
        "compiled_wait",  # AsyncCollectiveTensor.wait() before a compiled block: gradients lost
    ],
)
def test_stepping_into_it_changes_the_numbers_and_parity_says_so(alone: Alone, name: str) -> None:
    # caught_by also holds the product as it is to the single process, on the mesh where the trap lies.
    assert caught_by(alone, mutant_named(name))


def _gathered_gradients() -> tuple[bool, bool]:
    """Whether the gradient of our all-gather, and of dist.nn's, is right where it arrives in a permuted layout."""
    from torch.distributed.nn.functional import all_gather

    from torchtitan_lite.distributed.collectives import gather

    rank, ranks = dist.get_rank(), dist.get_world_size()
    weights = torch.arange(ranks * 2 * 3 * 4, dtype=torch.float32).view(ranks, 2, 3, 4)
    right = ranks * weights[rank].transpose(1, 2).contiguous().transpose(1, 2)

    def gradient(gathered: Any) -> torch.Tensor:
        x = torch.zeros(2, 3, 4, requires_grad=True)
        # Attention returns [batch, seq, heads] as a transposed view; so do its gradients.
        grads = [weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in weights]
        torch.autograd.backward(list(gathered(x)), grads)
        assert x.grad is not None
        return x.grad

    ours = gradient(lambda x: gather(x, dist.group.WORLD).unbind(0))
    theirs = gradient(lambda x: all_gather(x, dist.group.WORLD))
    return torch.equal(ours, right), torch.equal(theirs, right)


def test_gathered_gradients_are_right_in_a_permuted_layout(pool: RankPool) -> None:
    """torch.distributed.nn's all_gather gets them wrong on gloo."""
    assert pool.run(_gathered_gradients, 2) == [(True, False)] * 2


def _recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache, checkpoint={"enable": True, "interval": 5})


def test_a_bit_flipped_in_a_checkpoint_is_noticed(pool: RankPool, tmp_path: Path, corpus: Path, cache: Path) -> None:
    """torch's distributed checkpoint loads a flipped bit of tensor data as it is."""
    recipe = _recipe(tmp_path, corpus, cache)
    _run(pool, 2, recipe, tmp_path / "run", "--training.steps=5")
    flip_a_bit(storage.step_folder(tmp_path / "run" / "checkpoint", 5) / storage.file_of(1))
    codes = pool.run(_train_again, 2, str(recipe), str(tmp_path / "run"), group=False)
    assert codes == [2, 2], "there is no other checkpoint"
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000005.bad"]


def _train_again(recipe: str, folder: str) -> int:
    from torchtitan_lite import train

    os.environ["LOG_RANK"] = "0"
    return train.main([recipe, f"--job.dump_folder={folder}", "--training.steps=10"])


def test_a_save_that_dies_leaves_the_checkpoint_before_it_alone(
    pool: RankPool, tmp_path: Path, corpus: Path, cache: Path
) -> None:
    """Saved over an older one, a checkpoint that died half-way loads as a mixture of both."""
    recipe = _recipe(tmp_path, corpus, cache)
    _run(pool, 1, recipe, tmp_path / "run", "--training.steps=5")
    folder = storage.step_folder(tmp_path / "run" / "checkpoint", 5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert pool.run(_dies_while_saving, 1, str(recipe), str(tmp_path / "run"), group=False) == ["died"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert storage.published_steps(folder.parent) == [5]


def _dies_while_saving(recipe: str, folder: str) -> str:
    from unittest.mock import patch

    with patch.object(storage, "publish", side_effect=KeyboardInterrupt):
        try:
            _train_again(recipe, folder)
        except KeyboardInterrupt:
            return "died"
    return "lived"


class _Broadcasts(TorchDispatchMode):
    """Counts broadcasts of tensors that are not contiguous, whoever asks for them."""

    strange = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "broadcast" in func._schema.name:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.strange += any(not tensor.is_contiguous() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _broadcast_layouts(recipe: str, *arguments: str) -> int:
    """Train under the eye of the watcher."""
    from torchtitan_lite import train

    os.environ["LOG_RANK"] = "0"
    with _Broadcasts() as seen:
        assert train.main([recipe, *arguments]) == 0
    return seen.strange


def _one_strange_broadcast() -> int:
    with _Broadcasts() as seen:
        dist.broadcast(torch.zeros(3, 2).t(), 0)
    return seen.strange


_ULYSSES = "--parallelism.context_parallel_rotate_method=alltoall"


def test_nothing_is_broadcast_in_a_layout_of_its_own(pool: RankPool, tmp_path: Path, corpus: Path, cache: Path) -> None:
    """gloo's broadcast sends memory as it lies: ranks with other layouts get other values."""
    assert pool.run(_one_strange_broadcast, 2) == [1, 1]  # the watcher sees
    recipe = _recipe(tmp_path, corpus, cache)
    for number, mesh in enumerate(("tensor", "pipeline", "context")):
        # By exchange of heads: a causal bias cannot be made under the watcher's mode.
        arguments = [f"--job.dump_folder={tmp_path / str(number)}", "--training.steps=2", _ULYSSES]
        assert pool.run(
            _broadcast_layouts, 2, str(recipe), f"--parallelism.{mesh}_parallel_degree=2", *arguments, group=False
        ) == [0, 0]


def test_grouped_products_are_not_used_without_care_of_their_tail() -> None:
    """torch's grouped products leave rows past the last group as the memory was. Who uses one has its tail cut, has a
    test that fills the tail with NaNs (see models/test_moe.py, quantization/test_grouped.py), and stands here."""
    careful = {"models/common/moe.py", "quantization/grouped.py"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and "grouped_mm" in node.attr and not _is_key(node):
                assert str(path.relative_to(PACKAGE)) in careful, f"{path}:{node.lineno}"


def _is_key(node: ast.Attribute) -> bool:
    """Of a recipe: quantize.grouped_mm."""
    return isinstance(node.value, ast.Attribute) and node.value.attr == "quantize"


def test_torch_has_as_many_threads_as_openmp(pool: RankPool) -> None:
    """Compiled code with other numbers of threads in the two is four times slower."""
    for threads in ("1", "2"):
        assert pool.run(_threads, 1, threads, group=False) == [int(threads)]


def _threads(threads: str) -> int:
    from torchtitan_lite.config.schema import Comm, Debug
    from torchtitan_lite.distributed import runtime

    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1"), threads
    try:
        runtime.start(Comm(), Debug())
        return torch.get_num_threads()
    finally:
        runtime.stop()
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = before
