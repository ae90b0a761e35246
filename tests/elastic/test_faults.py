"""Steps whose numbers are wrong: skipped by all ranks alike, to the bit; rolled back past; found by a replay."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoint.reading import events, last_lines, whole_tensors
from tests.ranks import RankPool
from tests.test_checkpoint_runs import _train_and_tell
from tests.test_trainer import _run, _train
from tests.tiny import write_recipe
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.data.passed_over import beyond, merged
from torchtitan_lite.observability.sinks import read_lines

STEPS = 8


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.toml",
        corpus,
        cache,
        checkpoint={"enable": True, "interval": 1, "keep_latest_k": 0},
        training={"steps": STEPS},
        metrics={"log_sample_ids": True},
    )


@contextmanager
def _poisoned(steps: list[int], value: float, rank: int) -> Iterator[None]:
    """Before clipping, a gradient of this rank's is multiplied by `value` in those steps, where `rank` is this one."""
    from torchtitan_lite import trainer

    clip, calls = trainer.clip_by_global_norm, iter(range(1, 1000))

    def poisoned(parameters: Any, *rest: Any) -> Any:
        parameters = list(parameters)
        if next(calls) in steps and int(os.environ["RANK"]) == rank:
            last = [p.grad for p in parameters if p.grad is not None][-1]  # the first one's rows are of rare tokens
            (last.to_local() if hasattr(last, "to_local") else last).mul_(value)
        return clip(parameters, *rest)

    with patch.object(trainer, "clip_by_global_norm", poisoned):
        yield


def _train_poisoned(steps: list[int], value: float, rank: int, recipe: str, *overrides: str) -> int:
    with _poisoned(steps, value, rank):
        return _train(recipe, *overrides)


def _tell_poisoned(steps: list[int], value: float, rank: int, recipe: str, *overrides: str) -> tuple[int, str]:
    with _poisoned(steps, value, rank):
        return _train_and_tell(recipe, *overrides)


def _state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = whole_tensors(storage.step_folder(folder / "checkpoint", step))
    return {name: value for name, value in tensors.items() if name.startswith(("model.", "optimizer."))}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


_DDP = "--parallelism.data_parallel_replicate_degree"
_DEGREE = "--parallelism.{}_parallel_degree=2".format
_MOE = ("--model.spec=tests.tiny:MOE", "--model.flavor=routed", "--moe.bias_update_rate=0.01")
MESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "ddp": (2, (f"{_DDP}=2",)),
    "fsdp": (3, ()),
    "tensor": (2, (_DEGREE("tensor"),)),
    "pipeline": (2, (_DEGREE("pipeline"), "--training.local_batch_size=2")),
    "experts": (2, (_DEGREE("expert"), *_MOE)),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_that_is_no_number_changes_nothing(pool: RankPool, recipe: Path, tmp_path: Path, mesh: str) -> None:
    ranks, overrides = MESHES[mesh]
    folder = tmp_path / "run"
    # The last rank's alone: the others learn of it through the norm.
    arguments = (str(recipe), f"--job.dump_folder={folder}", *overrides)
    codes = pool.run(_train_poisoned, ranks, [3], math.nan, ranks - 1, *arguments, group=False)
    assert codes == [0] * ranks
    assert _equal(_state(folder, 3), _state(folder, 2)), "parameters, moments, step counts and biases, to the bit"
    assert not _equal(_state(folder, 4), _state(folder, 3)), "and it goes on"
    assert all(tensor.isfinite().all() for tensor in _state(folder, STEPS).values())
    (skipped,) = events(folder, "skipped step")
    assert (skipped["step"], skipped["why"], skipped["in_a_row"]) == (3, "non-finite gradient norm", 1)
    assert skipped["ids"] == read_lines(folder / "samples.jsonl")[2]["ids"]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "it counts as a step"
    # Under DDP all have the gradient, and the first rank's is sound.
    assert math.isfinite(float(lines[2]["grad_norm"])) is (mesh == "ddp")
    assert lines[-1]["tokens_seen"] == STEPS * 8 * 32


def test_skips_are_the_same_on_every_number_of_ranks(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    runs = []
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        arguments = (str(recipe), f"--job.dump_folder={folder}")
        pool.run(_train_poisoned, ranks, [2, 5], math.inf, 0, *arguments, group=False)
        assert [event["step"] for event in events(folder, "skipped step")] == [2, 5]
        runs.append([line["loss"] for line in read_lines(folder / "metrics.jsonl")])
    for losses in runs[1:]:
        assert losses == pytest.approx(runs[0], rel=1e-6)


@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
def test_a_guard_that_finds_nothing_changes_no_bit(
    pool: RankPool, recipe: Path, tmp_path: Path, implementation: str
) -> None:
    how = f"--optimizer.implementation={implementation}"
    on = _run(pool, 2, recipe, tmp_path / "on", how, "--faults.grad_norm_spike_sigmas=1000")
    off = _run(pool, 2, recipe, tmp_path / "off", how, "--faults.skip_nonfinite=false")
    exact = ("loss", "grad_norm")
    assert [[line[key] for key in exact] for line in on] == [[line[key] for key in exact] for line in off]
    assert _equal(_state(tmp_path / "on", STEPS), _state(tmp_path / "off", STEPS))


@pytest.mark.parametrize("implementation", ["foreach", "for-loop"])
def test_other_optimizers_skip_too(pool: RankPool, recipe: Path, tmp_path: Path, implementation: str) -> None:
    folder = tmp_path / "run"
    arguments = (str(recipe), f"--job.dump_folder={folder}", f"--optimizer.implementation={implementation}")
    assert pool.run(_train_poisoned, 2, [3], math.nan, 1, *arguments, group=False) == [0, 0]
    assert _equal(_state(folder, 3), _state(folder, 2))


def test_a_spike_is_skipped_and_does_not_move_the_mean(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limits = ("--faults.grad_norm_spike_sigmas=6", "--faults.warmup_steps=4")
    arguments = (str(recipe), f"--job.dump_folder={folder}", *limits)
    assert pool.run(_train_poisoned, 2, [7], 1e6, 0, *arguments, group=False) == [0, 0]
    (skipped,) = events(folder, "skipped step")
    assert (skipped["step"], skipped["why"]) == (7, "gradient norm spike")
    assert skipped["grad_norm"] > skipped["grad_norm_limit"] > 0
    statistics = [
        whole_tensors(storage.step_folder(folder / "checkpoint", step))["faults.statistics"] for step in (6, 7, 8)
    ]
    assert torch.equal(statistics[1][:5], statistics[0][:5])
    assert [int(each[0]) for each in statistics] == [6, 6, 7], "good steps so far"


def test_the_statistics_go_through_a_resume(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    limit = "--faults.loss_spike_sigmas=100"
    _run(pool, 1, recipe, tmp_path / "whole", limit)
    for ranks, steps in ((2, 3), (3, 5), (1, STEPS)):
        _run(pool, ranks, recipe, tmp_path / "parts", limit, f"--training.steps={steps}")
    ends = [whole_tensors(storage.step_folder(tmp_path / n / "checkpoint", STEPS)) for n in ("whole", "parts")]
    one, other = (end["faults.statistics"] for end in ends)
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-5)


def test_guards_turn_on_and_off_between_starts(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    for steps, guarded in ((2, "true"), (4, "false"), (6, "true")):
        _run(pool, 2, recipe, tmp_path / "run", f"--training.steps={steps}", f"--faults.skip_nonfinite={guarded}")
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2, 4]


def test_too_many_in_a_row_stop_the_run_at_the_last_good_state(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (str(recipe), f"--job.dump_folder={folder}", "--faults.max_in_a_row=1")
    ends = pool.run(_tell_poisoned, 2, [4, 5, 6, 7, 8], math.nan, 1, *arguments, group=False)
    assert [code for code, _ in ends] == [2, 2]
    line = ends[0][1]
    # The device is a step ahead of what the host has read.
    assert "3 steps in a row up to step 6 were skipped (non-finite gradient norm), more than faults.max" in line
    assert 'faults.then = "roll_back"' in line
    assert [event["step"] for event in events(folder, "skipped step")][:2] == [4, 5]
    latest = storage.published_steps(folder / "checkpoint")[-1]
    assert _equal(_state(folder, latest), _state(folder, 3))


def test_a_roll_back_passes_over_the_samples_for_good(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("--faults.max_in_a_row=1", '--faults.then="roll_back"', "--checkpoint.interval=3")
    arguments = (str(recipe), f"--job.dump_folder={folder}", *settings)
    assert pool.run(_train_poisoned, 2, [4, 5], math.nan, 0, *arguments, group=False) == [0, 0]
    (back,) = events(folder, "roll back")
    ranges = json.loads((folder / "passed_over.json").read_text())["positions"]
    assert ranges == [[24, 40]], "the samples of steps 4 and 5, eight a step"
    ids = {line["step"]: line["ids"] for line in last_lines(folder / "samples.jsonl")}
    whole = _run(pool, 1, recipe, tmp_path / "whole", "--training.steps=10")
    expected = [line["ids"] for line in read_lines(tmp_path / "whole" / "samples.jsonl")]
    assert [ids[step] for step in range(1, STEPS + 1)] == expected[:3] + expected[5:10]
    lines = last_lines(folder / "metrics.jsonl")
    assert [line["loss"] for line in lines[:3]] == pytest.approx([line["loss"] for line in whole[:3]], rel=1e-6)
    assert back["step"] == 3
    # A later start, on other ranks, goes on in the same order.
    _run(pool, 3, recipe, folder, *settings, "--training.steps=10", "--lr_scheduler.total_steps=20")
    ids = {line["step"]: line["ids"] for line in last_lines(folder / "samples.jsonl")}
    _run(pool, 1, recipe, tmp_path / "longer", "--training.steps=12")
    expected = [line["ids"] for line in read_lines(tmp_path / "longer" / "samples.jsonl")]
    assert [ids[step] for step in range(1, 11)] == expected[:3] + expected[5:12]


def test_a_roll_back_that_does_not_help_stops(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("--faults.max_in_a_row=0", '--faults.then="roll_back"')
    arguments = (str(recipe), f"--job.dump_folder={folder}", *settings)
    ends = pool.run(_tell_poisoned, 2, list(range(4, 100)), math.nan, 0, *arguments, group=False)
    assert [code for code, _ in ends] == [2, 2]
    assert "rolling back has not helped" in ends[0][1]


def test_positions_are_passed_over_wherever_a_step_begins() -> None:
    ranges = merged([(10, 14), (3, 5), (5, 6), (14, 15), (30, 31)])
    assert ranges == [(3, 6), (10, 15), (30, 31)]
    taken = [p for p in range(40) if not any(begin <= p < end for begin, end in ranges)]
    for start in range(35):
        expected = [p for p in taken if p >= start]
        found = [beyond(ranges, start, count) for count in range(min(len(expected), 12))]
        assert found == expected[: len(found)], start


_NO_RANGES = ("3", "[[3, 1]]", '[["a", 2]]')


@pytest.mark.parametrize("content", ["{", "[]", *(f'{{"positions": {what}}}' for what in _NO_RANGES)])
def test_a_list_of_positions_that_is_none_is_named(pool: RankPool, recipe: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "passed_over.json").write_text(content)
    ((code, line),) = pool.run(_train_and_tell, 1, str(recipe), f"--job.dump_folder={folder}", group=False)
    assert code == 2
    assert "passed_over.json: " in line
    assert "remove it to pass over nothing" in line


class _Reads(TorchDispatchMode):
    """Counts numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _reads_in_steps(recipe: str, *overrides: str) -> int:
    from torchtitan_lite.trainer import Trainer

    step, reads = Trainer.step, _Reads()

    def watched(self: Trainer, batches: Any) -> Any:
        with reads:
            return step(self, batches)

    with patch.object(Trainer, "step", watched):
        assert _train(recipe, *overrides) == 0
    return reads.count


def test_a_guard_reads_nothing_on_the_host_where_the_optimizer_looks_at_the_device(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    """A step counts its labels on the host, where they are; guards add nothing to that."""
    settings = ("--training.local_batch_size=1", "--training.steps=3")
    counts = {}
    for name, overrides in {
        "off": ("--faults.skip_nonfinite=false",),
        "on": ("--faults.loss_spike_sigmas=9", "--faults.grad_norm_spike_sigmas=9"),
        "another optimizer": ("--optimizer.implementation=foreach",),
    }.items():
        arguments = (f"--job.dump_folder={tmp_path / name}", *settings, *overrides)
        (counts[name],) = set(pool.run(_reads_in_steps, 2, str(recipe), *arguments, group=False))
    assert counts["on"] == counts["off"]
    assert counts["another optimizer"] >= counts["off"] + 3, "one a step"


def _replay_with_a_bad_bit(bad_rank: int, bad_run: int, recipe: str, *overrides: str) -> tuple[int, str]:
    """In run `bad_run` of a step's forward and backward one rank's gradient of one parameter is off by a bit."""
    from torchtitan_lite.trainable import TrainableModel

    name = "forward_backward"
    owners = [kind for kind in _subclasses(TrainableModel) if name in vars(kind)]
    usual, calls = {owner: getattr(owner, name) for owner in owners}, iter(range(1, 1000))

    def bad(self: Any, batches: Any) -> Any:
        loss = usual[next(kind for kind in type(self).__mro__ if kind in usual)](self, batches)
        if next(calls) == bad_run and int(os.environ["RANK"]) == bad_rank:
            grad = dict(self.named_parameters())["layers.1.attention_norm.weight"].grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            local.view(torch.int32).view(-1)[:1] ^= 1
        return loss

    from contextlib import ExitStack

    with ExitStack() as patches:
        for owner in owners:
            patches.enter_context(patch.object(owner, name, bad))
        try:
            return _train_and_tell(recipe, *overrides)
        except IndexError:
            return 0, ""


def _subclasses(kind: type) -> list[type]:
    return [kind, *(each for child in kind.__subclasses__() for each in _subclasses(child))]


def test_a_replay_finds_a_flipped_bit_and_names_the_rank(pool: RankPool, recipe: Path, tmp_path: Path) -> None:
    settings = ("--debug.deterministic=true", "--debug.replay_steps=[3]", "--training.steps=4")
    for bad_run, folder in ((3, tmp_path / "first"), (4, tmp_path / "second")):
        arguments = (str(recipe), f"--job.dump_folder={folder}", *settings)
        ends = pool.run(_replay_with_a_bad_bit, 2, 1, bad_run, *arguments, group=False)
        assert [code for code, _ in ends] == [1, 1]
        line = ends[0][1]
        assert line.startswith("error: step 3 ran twice on the same inputs, and gradients differ")
        assert "on rank 1 on host" in line
        assert "rank 0" not in line
        assert "layers.1.attention_norm.weight" in line
        assert events(folder, "silent corruption")[0]["step"] == 3


@pytest.mark.parametrize("mesh", MESHES)
def test_a_replay_of_sound_steps_changes_nothing(pool: RankPool, recipe: Path, tmp_path: Path, mesh: str) -> None:
    ranks, overrides = MESHES[mesh]
    settings = (*overrides, "--debug.deterministic=true", "--training.steps=4")
    plain = _run(pool, ranks, recipe, tmp_path / "plain", *settings)
    replayed = _run(pool, ranks, recipe, tmp_path / "replayed", *settings, "--debug.replay_steps=[2,3]")
    exact = ("loss", "grad_norm", "moe_tokens_per_expert")
    runs = [[[line.get(key) for key in exact] for line in lines] for lines in (plain, replayed)]
    assert runs[0] == runs[1]
    assert _equal(_state(tmp_path / "replayed", 4), _state(tmp_path / "plain", 4))


def _told_after_a_restart(recipe: str, *overrides: str) -> tuple[int, str]:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return _train_and_tell(recipe, *overrides)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def test_a_run_that_faults_have_stopped_is_not_started_again_by_torchrun(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    arguments = (str(recipe), f"--job.dump_folder={tmp_path / 'run'}", "--faults.max_in_a_row=1")
    ends = pool.run(_tell_poisoned, 2, [4, 5, 6], math.nan, 1, *arguments, group=False)
    again = pool.run(_told_after_a_restart, 2, *arguments, group=False)
    assert again == ends, "the same line, the same code"
    assert _run(pool, 2, recipe, tmp_path / "run")[-1]["step"] == STEPS, "a start by hand goes on"
