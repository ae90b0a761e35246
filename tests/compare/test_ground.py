"""What two runs have in common and what follows from it, by runs that differ in one thing."""

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare.folders import FULL, pair_of, write_run, write_side
from torchtitan_lite.compare.comparable import Ground, ground
from torchtitan_lite.compare.courses import ends, reached, spent
from torchtitan_lite.compare.document import _pair
from torchtitan_lite.compare.runs import Run, read_run
from torchtitan_lite.compare.sides import Source, gather
from torchtitan_lite.compare.verdicts import loss_verdict, speed_verdict
from torchtitan_lite.recipe_diff import parted

TENSOR_PARALLEL = "--parallelism.tensor_parallel_degree=2"


def _between(a: Path, b: Path) -> Ground:
    x, y = read_run(a), read_run(b)
    return ground(x, y, *parted(x.described, y.described))


def _set(folder: Path, **values: Any) -> Path:
    """In config.json."""
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **values}))
    return folder


def _started(folder: Path, host: str) -> Path:
    path = folder / "events.jsonl"
    path.write_text(path.read_text().replace('"event": "start"', f'"event": "start", "host": "{host}"'))
    return folder


def _every_tenth(folder: Path) -> Path:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[9::10]))
    return folder


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ((), 2e-6),
        (('--model.converters=["quantize.linear.float8"]', "--quantize.linear.float8.emulate=true"), 2e-4),
        (("--training.mixed_precision_param=bfloat16",), 5e-4),
        (("--optimizer.state_dtype=bfloat16",), 5e-4),
    ],
)
def test_the_envelope_is_of_the_precision_and_grows_with_the_steps(
    tmp_path: Path, overrides: tuple[str, ...], most: float
) -> None:
    between = _between(write_run(tmp_path / "a", *overrides), write_run(tmp_path / "b", TENSOR_PARALLEL, *overrides))
    assert between.limit is not None
    assert [between.limit(step) for step in (1, 12, 24, 1200)] == pytest.approx([most, most, 2 * most, 100 * most])


def test_another_version_of_torch_may_round_otherwise(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), _set(write_run(tmp_path / "b"), versions={"torch": "2.14.0"})
    between = _between(a, b)
    assert between.limit is not None
    assert between.limit(1) > 0
    assert "the version of torch only changes rounding" in between.why


def test_kernels_of_a_gpu_round_otherwise_each_time_unless_they_are_told_not_to(tmp_path: Path) -> None:
    for number, (deterministic, most) in enumerate((("false", 2e-6), ("true", 0.0))):
        a, b = (
            _set(
                write_run(tmp_path / f"{name}{number}", f"--debug.deterministic={deterministic}"), device="NVIDIA H100"
            )
            for name in "ab"
        )
        between = _between(a, b)
        assert between.limit is not None
        assert between.limit(1) == most
        assert ("kernels of NVIDIA H100" in between.why) == (deterministic == "false")


def test_a_compiler_may_fuse_what_is_computed_again_otherwise(tmp_path: Path) -> None:
    compiled = "--compile.enable=true"
    between = _between(write_run(tmp_path / "a", compiled), write_run(tmp_path / "b", compiled, FULL))
    assert between.limit is not None
    assert between.limit(1) > 0


@pytest.mark.parametrize(
    ("override", "weights"),
    [("--checkpoint.initial_load_path=elsewhere", False), ("--checkpoint.interval=7", True)],
)
def test_weights_that_are_loaded_are_another_start(tmp_path: Path, override: str, weights: bool) -> None:
    between = _between(write_run(tmp_path / "a"), write_run(tmp_path / "b", override))
    assert (between.weights, between.limit is not None) == (weights, weights)


@pytest.mark.parametrize("devices", [("CPU", "NVIDIA H100"), ("NVIDIA H100", "NVIDIA H200")])
def test_speed_is_not_compared_across_devices(tmp_path: Path, devices: tuple[str, str]) -> None:
    a, b = (_set(write_run(tmp_path / device), device=device) for device in devices)
    pair = pair_of(str(a), str(b))
    assert (pair["speed"]["verdict"], pair["comparable"]["hardware"]) == ("not comparable", False)
    assert f"they ran on {devices[0]} and {devices[1]}" in pair["words"]


@pytest.mark.parametrize(
    ("device", "hosts", "alike"),
    [
        ("CPU", ("h1", "h2"), False),
        ("CPU", ("h1", "h1"), True),
        ("CPU", ("h1", None), True),
        ("NVIDIA H100", ("h1", "h2"), True),
    ],
)
def test_a_gpu_is_known_by_its_name_and_a_cpu_by_its_host(
    tmp_path: Path, device: str, hosts: tuple[str | None, str | None], alike: bool
) -> None:
    folders = [_set(write_run(tmp_path / name), device=device) for name in "ab"]
    for folder, host in zip(folders, hosts, strict=True):
        if host:
            _started(folder, host)
    assert _between(*folders).hardware == alike


def test_another_model_is_compared_at_equal_flops(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    identity = json.loads((b / "config.json").read_text())["identity"]
    _set(b, identity={**identity, "model": "another", "training.seq_len": "64"})
    pair = pair_of(str(a), str(b))
    assert pair["along"] == "flops"
    assert "the model is another: losses are compared at equal FLOPs" in pair["words"]
    assert "samples have another length" in pair["words"]
    assert not pair["comparable"]["weights"]


@pytest.mark.parametrize(("started", "noted"), [(1e9 + 7200, True), (1e9 + 600, False), (None, True)])
def test_repeats_that_did_not_run_side_by_side_are_noted(tmp_path: Path, started: float | None, noted: bool) -> None:
    a, b = write_side(tmp_path / "a", repeats=2), write_side(tmp_path / "b", repeats=2, started=started)
    assert ("did not run side by side" in pair_of(a, b)["speed"]["told"]) == noted


def test_seconds_are_of_all_steps_however_often_a_run_logs(tmp_path: Path) -> None:
    often, seldom = read_run(write_run(tmp_path / "a")), read_run(_every_tenth(write_run(tmp_path / "b")))
    for run in (often, seldom):
        assert spent(run, "seconds")[-1] == pytest.approx(80 * 0.4)
        assert spent(run, "tokens")[-1] == 80 * 2048
        assert spent(run, "flops")[-1] == pytest.approx(80 * 2048 * 3e7)
    at_equal = pair_of(str(tmp_path / "a"), str(tmp_path / "b"))["loss"]["at_equal"]
    assert at_equal["seconds"]["spent"] == pytest.approx(80 * 0.4)


def test_the_end_is_where_all_have_come_to(tmp_path: Path) -> None:
    a, b = read_run(write_run(tmp_path / "a", steps=100)), read_run(write_run(tmp_path / "b", steps=100))
    short = replace(b, curve={name: values[:60] for name, values in b.curve.items()})
    most, left, right = ends([a], [short], "steps")
    assert most == 60
    assert left == right == [pytest.approx(sum(a.curve["loss"][54:60]) / 6)]
    seldom = replace(b, curve={name: values[9::10] for name, values in b.curve.items()})
    at = [pytest.approx(sum(a.curve["loss"][19:60:10]) / 5)]
    assert ends([seldom], [short], "steps") == (60, at, at)
    late = replace(b, curve={name: values[99::100] for name, values in b.curve.items()})
    assert ends([seldom], [late], "steps") == (100, [a.curve["loss"][99]], [a.curve["loss"][99]])
    # On the line between two logged values, where another run has logged.
    odd = replace(a, curve={name: values[2::3] for name, values in a.curve.items()})
    straight = [replace(run, curve={**run.curve, "loss": run.curve["step"]}) for run in (seldom, odd)]
    assert ends(straight[:1], straight[1:], "steps")[1:] == ([70.0], [pytest.approx(70.0)])


@pytest.mark.parametrize(("steps", "first"), [(4, 2), (19, 2), (60, 7), (1000, 21)])
def test_times_of_first_steps_do_not_count(tmp_path: Path, steps: int, first: int) -> None:
    run = read_run(write_run(tmp_path / "a", steps=steps))
    assert run.steady("step") == list(range(first, steps + 1))
    assert read_run(write_run(tmp_path / "b", steps=1)).steady("step") == [1]


def test_the_final_loss_is_of_the_last_tenth_and_of_five_at_least(tmp_path: Path) -> None:
    for steps, last in ((3, 3), (20, 5), (100, 10)):
        run = read_run(write_run(tmp_path / str(steps), steps=steps))
        assert run.final_loss() == pytest.approx(sum(run.curve["loss"][-last:]) / last)


@pytest.mark.parametrize(
    ("override", "most"),
    [
        ("--compile.enable=true", 2e-6),
        ("--optimizer.implementation=foreach", 2e-6),
        ("--parallelism.data_parallel_replicate_degree=2", 2e-6),
        ("--training.local_batch_size=2", 2e-6),
        ("--training.loss_chunks=2", 2e-6),
        ("--comm.train_timeout_seconds=77", 0.0),
        ("--job.description=another", 0.0),
        ("--metrics.log_freq=7", 0.0),
        ("--training.gc_freq=7", 0.0),
        ("--optimizer.lr=0.0031", None),
        ("--training.max_norm=0.7", None),
        ("--lr_scheduler.warmup_steps=7", None),
    ],
)
def test_what_a_key_does_to_the_loss(tmp_path: Path, override: str, most: float | None) -> None:
    limit = _between(write_run(tmp_path / "a"), write_run(tmp_path / "b", override)).limit
    assert (limit and limit(1)) == most


def test_other_ranks_alone_add_in_another_order(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    limit = ground(run, run, {}, {"world_size": (1, 2)}).limit
    assert limit is not None
    assert limit(1) == 2e-6


def test_runs_of_one_recipe_that_have_no_seed_in_common_are_said_to(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    loss = loss_verdict([_made(run, 1)], [_made(run, 2)], ground(run, run, {"debug": {"seed": (1, 2)}}, {}))
    assert (loss.verdict, loss.envelope) == ("no difference shown", None)
    assert "their seeds differ" in loss.told


def test_sides_of_one_recipe_whose_runs_have_other_seeds_do_not_begin_alike(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    a, b = gather([Source(str(folder)) for folder in folders], 2, None)[0]
    pair = _pair(a, replace(b, described=a.described), None)
    assert pair["config_diff"] == {"debug": {"seed": (1, 2)}}
    assert pair["comparable"]["weights"] is False


def test_a_loss_that_is_no_number_where_the_other_is_one_is_different(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    between = ground(run, run, {}, {})
    spoilt = _made(run, 42, loss=[*[4.0] * 79, math.nan])
    assert loss_verdict([_made(run, 42)], [spoilt], between).verdict == "different"
    assert loss_verdict([spoilt], [spoilt], between).verdict == "equal"


def test_batches_go_out_of_a_gap_only_where_both_have_had_them(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    between = replace(ground(run, run, {}, {}), limit=None)
    batches = [[above + (3.0 if at % 2 else 5.0) for at in range(80)] for above in (0.0, 0.2)]
    for seed, verdict in ((1, "different"), (2, "no difference shown")):
        found = loss_verdict([_made(run, 1, loss=batches[0])], [_made(run, seed, loss=batches[1])], between)
        assert (found.verdict, found.gap) == (verdict, pytest.approx(0.2))


def test_four_repeats_are_held_to_students_interval_alone(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", steps=12))
    between = replace(ground(run, run, {}, {}), limit=None)
    a = [_made(run, seed) for seed in range(4)]
    b = [_made(run, seed, 0.4 * factor, 4.0 * factor) for seed, factor in enumerate((0.9, 1.3, 1.8, 1.1))]
    assert speed_verdict(a, b, between).verdict == loss_verdict(a, b, between).verdict == "no difference shown"
    assert speed_verdict(a[1:3], b[1:3], between).verdict == "slower"
    assert loss_verdict(a[1:3], b[1:3], between).verdict == "different"


def _made(run: Run, seed: int, time: float = 0.4, loss: float | list[float] = 4.0) -> Run:
    config = copy.deepcopy(run.described.config)
    config["debug"]["seed"] = seed
    losses = loss if isinstance(loss, list) else [loss] * len(run.steps)
    curve = {**run.curve, "step_time_s": [time] * len(run.steps), "loss": losses}
    return replace(run, described=replace(run.described, config=config), curve=curve)


@pytest.mark.parametrize("in_pairs", [True, False])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_few_repeats_of_what_is_alike_show_a_difference_once_in_twenty_at_most(
    tmp_path: Path, repeats: int, in_pairs: bool
) -> None:
    # Runs of one recipe lie 3% of time and 0.3% of loss apart.
    run, noise, count = read_run(write_run(tmp_path / "a", steps=6)), random.Random(repeats), 40
    between = replace(ground(run, run, {}, {}), limit=None)
    wrong = {"loss": 0, "speed": 0}
    for _ in range(count):
        a, b = (
            [_made(run, first + at, 0.4 * noise.gauss(1, 0.03), 4 * noise.gauss(1, 0.003)) for at in range(repeats)]
            for first in (1, 1 if in_pairs else 101)
        )
        wrong["loss"] += loss_verdict(a, b, between).verdict != "no difference shown"
        wrong["speed"] += speed_verdict(a, b, between).verdict != "no difference shown"
    assert max(wrong.values()) <= count // 20
    a = [_made(run, at, 0.4 * noise.gauss(1, 0.01), 4 * noise.gauss(1, 0.001)) for at in range(repeats)]
    b = [_made(run, at, 0.5 * noise.gauss(1, 0.01), 4.2 * noise.gauss(1, 0.001)) for at in range(repeats)]
    loss, speed = loss_verdict(a, b, between), speed_verdict(a, b, between)
    assert (loss.verdict, speed.verdict) == ("different", "slower")
    assert loss.interval is not None
    assert 0.1 < loss.interval[0] < loss.interval[1] < 0.3


def test_a_target_is_reached_where_the_mean_of_five_is_there(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", steps=10))
    run = replace(run, curve={**run.curve, "loss": [10.0 - step for step in run.curve["step"]]})
    assert reached(run, 7.0) == pytest.approx({"step": 5, "tokens": 5 * 2048, "seconds": 2.0})
    assert reached(run, 1.0) is None
