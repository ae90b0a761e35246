"""Verdicts on pairs whose answer is known."""

import json
import random
from pathlib import Path

import pytest

from tests.compare.folders import FULL, compared, pair_of, write_run, write_side
from torchtitan_lite.compare.sides import Source, gather
from torchtitan_lite.compare.statistics import block_bootstrap, paired_interval, unpaired_interval


def test_identical_recipes_differ_in_at_most_one_of_twenty_comparisons(tmp_path: Path) -> None:
    noise, shown = random.Random(7), []
    for number in range(20):
        a, b = (write_side(tmp_path / f"{name}{number}", noise=noise) for name in "ab")
        pair = pair_of(a, b)
        assert (pair["loss"]["verdict"], pair["loss"]["gap"], pair["loss"]["envelope"]) == ("equal", 0.0, 0.0)
        shown.append(pair["speed"]["verdict"] == "no difference shown")
        assert pair["config_diff"] == {}
    assert sum(shown) >= 19


def test_five_percent_slower_is_found_with_enough_repeats(tmp_path: Path) -> None:
    noise = random.Random(3)
    for number in range(10):
        a = write_side(tmp_path / f"a{number}", noise=noise, repeats=8)
        b = write_side(tmp_path / f"b{number}", noise=noise, repeats=8, step_time_s=0.42)
        speed = pair_of(a, b)["speed"]
        assert speed["verdict"] == "slower"
        low, high = speed["interval"]
        assert low < speed["ratio"] < high < 1


def test_one_run_a_side_does_not_show_five_percent(tmp_path: Path) -> None:
    noise = random.Random(3)
    a, b = (str(write_run(tmp_path / name, noise=noise, step_time_s=time)) for name, time in (("a", 0.4), ("b", 0.42)))
    speed = pair_of(a, b)["speed"]
    assert speed["verdict"] == "no difference shown"
    assert "one run a side" in speed["told"]
    assert speed["pairs"] == pytest.approx([speed["ratio"]])
    slow = str(write_run(tmp_path / "slow", noise=noise, step_time_s=0.6))
    assert pair_of(a, slow)["speed"]["verdict"] == "slower"


def test_repeats_of_one_seed_are_runs_of_their_own(tmp_path: Path) -> None:
    noise, shown = random.Random(11), 0
    for number in range(40):
        sides = []
        for name in "ab":
            for repeat in range(5):
                write_run(tmp_path / f"{name}{number}" / f"repeat-{repeat}", noise=noise, steps=12)
            sides.append(str(tmp_path / f"{name}{number}"))
        shown += pair_of(*sides)["speed"]["verdict"] != "no difference shown"
    assert shown <= 2


def test_two_repeats_show_what_one_run_a_side_shows_and_no_more(tmp_path: Path) -> None:
    noise, wrong = random.Random(5), 0
    for number in range(20):
        a, b = (write_side(tmp_path / f"{name}{number}", noise=noise, repeats=2, steps=20) for name in "ab")
        wrong += pair_of(a, b)["speed"]["verdict"] != "no difference shown"
    assert wrong <= 1
    slow = write_side(
        tmp_path / "slow", "--optimizer.lr=1.0", noise=noise, repeats=2, steps=20, step_time_s=0.6, loss=5.0
    )
    pair = pair_of(a, slow)
    assert (pair["speed"]["verdict"], pair["loss"]["verdict"]) == ("slower", "different")
    low, high = pair["speed"]["interval"]
    assert 0.5 < low < high < 0.8
    near = write_side(tmp_path / "near", "--optimizer.lr=0.0031", repeats=2, steps=20, wiggle=2e-3)
    assert pair_of(a, near)["loss"]["verdict"] == "different"  # the same in both pairs


def test_one_run_is_held_to_the_one_of_its_seed(tmp_path: Path) -> None:
    for seed in (42, 43, 44):
        write_run(tmp_path / "a" / str(seed), seed=seed, step_time_s=seed / 100)
    one = str(write_run(tmp_path / "b", "--optimizer.lr=0.0031", seed=44, step_time_s=0.44))
    pair = pair_of(str(tmp_path / "a"), one)
    assert (pair["loss"]["gap"], set(pair["loss"]["gaps"])) == (0.0, {0.0})
    assert pair["speed"]["ratio"] == pytest.approx(1.0)


def test_several_runs_are_held_to_a_single_one_as_a_whole(tmp_path: Path) -> None:
    for seed, seconds in ((1, 0.4), (2, 0.8), (3, 0.8)):
        write_run(tmp_path / "a" / str(seed), seed=seed, step_time_s=seconds)
    one = str(write_run(tmp_path / "b", seed=4, step_time_s=0.4))
    speed = pair_of(str(tmp_path / "a"), one)["speed"]
    assert speed["ratio"] == pytest.approx(4 ** (1 / 3))
    assert speed["told"].startswith("3 and 1 runs, not in pairs, of which two alike differ")
    same = str(write_run(tmp_path / "c", seed=1, step_time_s=0.4))
    told = pair_of(str(tmp_path / "a"), same)["speed"]["told"]
    assert told.startswith("one run a side with a seed in common, of which two alike differ")


def test_ends_are_of_one_stretch_however_often_runs_log(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", steps=200), write_run(tmp_path / "b", "--optimizer.lr=0.0031", steps=200)
    lines = (b / "metrics.jsonl").read_text().splitlines(keepends=True)
    (b / "metrics.jsonl").write_text("".join(lines[9::10]))
    assert pair_of(str(a), str(b))["loss"]["gap"] == pytest.approx(0.0, abs=1e-9)
    assert pair_of(str(b), str(a))["loss"]["gap"] == pytest.approx(0.0, abs=1e-9)


def test_times_that_hold_the_first_step_say_nothing_of_speed(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", steps=20), write_run(tmp_path / "b", steps=20)
    for folder, seconds in ((a, 0.4), (b, 2.0)):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][9::10]
        lines[0]["step_time_s"] = seconds
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pair_of(str(a), str(b))["speed"]["ratio"] == pytest.approx(1.0)
    (b / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    speed = pair_of(str(a), str(b))["speed"]
    assert (speed["verdict"], speed["ratio"]) == ("not comparable", None)


def test_other_seeds_are_the_reason_that_is_told(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)
    pair = pair_of(str(a), str(b))
    assert pair["loss"]["verdict"] == "no difference shown"
    assert "curves may differ: their seeds differ;" in pair["loss"]["told"]
    assert pair["config_diff"] == {"debug": {"seed": (1, 2)}}
    assert "differ in debug.seed. Note: their seeds differ" in pair["words"]
    assert not pair["comparable"]["weights"]
    c = write_run(tmp_path / "c", "--optimizer.lr=0.0031", seed=3)
    told = pair_of(str(a), str(c))["loss"]["told"]
    assert "curves may differ: optimizer.lr may change them, and their seeds differ;" in told


def test_seeds_of_runs_in_pairs_are_no_difference(tmp_path: Path) -> None:
    side, one = write_side(tmp_path / "a"), str(write_run(tmp_path / "b", seed=44))
    pair = pair_of(side, one)
    assert (pair["config_diff"], pair["loss"]["verdict"], pair["comparable"]["weights"]) == ({}, "equal", True)


def test_a_few_steps_of_other_seeds_are_not_compared_in_loss(tmp_path: Path) -> None:
    a, b = (
        write_run(tmp_path / name, seed=seed, steps=1, loss=loss) for name, seed, loss in (("a", 1, 4), ("b", 2, 5))
    )
    loss = pair_of(str(a), str(b))["loss"]
    assert (loss["verdict"], loss["gap"]) == ("not comparable", None)
    assert "1 logged losses do not tell batches from recipes" in loss["told"]
    same = write_run(tmp_path / "c", "--optimizer.lr=0.0031", seed=1, steps=1, loss=9)
    assert pair_of(str(a), str(same))["loss"]["verdict"] != "not comparable"


def test_cpus_of_two_machines_are_not_compared_in_speed(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", step_time_s=0.8)
    for folder, host in ((a, "h1"), (b, "h2")):
        lines = (folder / "events.jsonl").read_text().replace('"event": "start"', f'"event": "start", "host": "{host}"')
        (folder / "events.jsonl").write_text(lines)
    pair = pair_of(str(a), str(b))
    assert pair["speed"]["verdict"] == "not comparable"
    assert "CPU of h1 and CPU of h2" in pair["words"]


def test_checkpointing_is_equal_slower_and_smaller(tmp_path: Path) -> None:
    noise = random.Random(1)
    a = write_side(tmp_path / "a", noise=noise)
    b = write_side(tmp_path / "b", FULL, noise=noise, step_time_s=0.5, memory_gib=0.45)
    pair = pair_of(a, b)
    assert pair["loss"]["verdict"] == "equal"
    assert pair["loss"]["envelope"] == 0.0
    assert pair["speed"]["verdict"] == "slower"
    assert pair["memory"] == {"a_gib": 0.6, "b_gib": 0.45, "ratio": 0.75}
    assert pair["config_diff"] == {"activation_checkpoint": {"mode": ("none", "full")}}


def test_checkpointing_that_moves_a_bit_is_different(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a"), write_side(tmp_path / "b", FULL, wiggle=1e-15)
    assert pair_of(a, b)["loss"]["verdict"] == "different"


@pytest.mark.parametrize(("wiggle", "verdict"), [(1e-6, "equal"), (3e-5, "different")])
def test_meshes_are_held_to_the_envelope_of_rounding(tmp_path: Path, wiggle: float, verdict: str) -> None:
    a = write_side(tmp_path / "a", repeats=2)
    b = write_side(tmp_path / "b", "--parallelism.tensor_parallel_degree=2", repeats=2, wiggle=wiggle)
    loss = pair_of(a, b)["loss"]
    assert loss["verdict"] == verdict
    assert (abs(loss["gap"]) <= loss["envelope"]) == (verdict == "equal")
    assert loss["interval"] is None
    assert len(loss["steps"]) == len(loss["gaps"]) == 80


def test_other_numbers_of_ranks_are_held_to_the_envelope_too(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a", repeats=1, ranks=1), write_side(tmp_path / "b", repeats=1, ranks=2, wiggle=1e-7)
    pair = pair_of(a, b)
    assert pair["loss"]["verdict"] == "equal"
    assert pair["derived_diff"]["world_size"] == (1, 2)


def test_a_wrong_learning_rate_is_different(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a"), write_side(tmp_path / "b", "--optimizer.lr=1.0", loss=6.0)
    loss = pair_of(a, b)["loss"]
    assert loss["verdict"] == "different"
    assert loss["envelope"] is None
    assert 1.8 < loss["gap"] < 2.2
    assert "optimizer.lr" in loss["told"]


def test_a_learning_rate_that_does_nothing_shows_nothing(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a"), write_side(tmp_path / "b", "--optimizer.lr=0.0031", wiggle=1e-5)
    other = write_side(tmp_path / "c", "--optimizer.lr=0.0031", wiggle=1e-3)
    assert abs(pair_of(a, b)["loss"]["gap"]) < 1e-3
    assert pair_of(a, other)["loss"]["verdict"] == "different"  # the same in all five pairs


def test_a_loss_that_is_no_number_is_different(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", repeats=2)
    b = write_side(tmp_path / "b", "--optimizer.lr=9.0", repeats=2, loss=float("nan"))
    loss = pair_of(a, b)["loss"]
    assert (loss["verdict"], loss["gap"]) == ("different", None)
    assert "loss of B is not finite" in loss["told"]


def test_runs_of_other_data_get_no_verdict_on_loss(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a"), write_side(tmp_path / "b", data="another")
    pair = pair_of(a, b)
    assert pair["loss"]["verdict"] == "not comparable"
    assert not pair["comparable"]["data"]
    assert "the data is another" in pair["words"]
    assert pair["speed"]["verdict"] == "no difference shown"


def test_another_batch_is_compared_at_equal_tokens(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", repeats=2)
    b = write_side(tmp_path / "b", "--training.global_batch_size=16", repeats=2)
    pair = pair_of(a, b)
    assert pair["along"] == "tokens"
    equal = pair["loss"]["at_equal"]["tokens"]
    assert equal["spent"] == 80 * 2048
    assert equal["b"] - equal["a"] == pytest.approx(pair["loss"]["gap"])
    assert pair["loss"]["steps"] == pair["loss"]["gaps"] == []  # a step is another thing for each
    assert pair["loss"]["gap"] > 0.1  # B is in the middle of its run there


def test_target_loss_tells_what_it_takes(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a"), write_side(tmp_path / "b", step_time_s=0.8)
    record = compared(a, b, target_loss=5.0)
    target = record["sides"][0]["summary"]["target"]
    assert target["reached"] == 5
    assert target["seconds"] == pytest.approx(0.4 * target["step"])
    assert record["pairs"][0]["target"] == pytest.approx({"step": 1.0, "tokens": 1.0, "seconds": 2.0})
    assert compared(a, b, target_loss=1.0)["sides"][0]["summary"]["target"]["step"] is None


def test_a_run_that_crashed_halfway_is_named_and_counts_as_far_as_it_goes(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=80, end=False)
    lines = (b / "metrics.jsonl").read_text().splitlines(keepends=True)
    (b / "metrics.jsonl").write_text("".join(lines[:40]) + lines[40][:20])
    record = compared(str(a), str(b))
    assert record["sides"][1]["runs"][0]["state"] == "cut short"
    assert "cut short at step 40 of 80" in record["words"]
    assert record["pairs"][0]["loss"]["verdict"] == "equal"
    assert record["pairs"][0]["loss"]["steps"] == list(range(1, 41))


def test_a_run_that_was_cut_short_says_nothing_of_the_end_beside_whole_ones(tmp_path: Path) -> None:
    sides = []
    for name, overrides in (("a", ()), ("b", ("--optimizer.lr=0.0031",))):
        sides.append(write_side(tmp_path / name, *overrides, repeats=3))
    cut = tmp_path / "b" / "repeat-2"
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:9]))
    (cut / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
    record = compared(*sides)
    loss = record["pairs"][0]["loss"]
    assert loss["at_equal"]["tokens"]["spent"] == 80 * 2048
    assert "2 repeats" in loss["told"]
    assert record["sides"][1]["summary"]["loss"] < 5


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("missing", "no such run"),
        ("metrics", "memory_peak_gib is missing; it is not of this version"),
        ("config", "is not a config.json of ours"),
        ("empty", "no step is logged"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_others_go_on(tmp_path: Path, broken: str, told: str) -> None:
    a, b = str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b"))
    bad = tmp_path / "bad"
    if broken != "missing":
        write_run(bad)
    if broken == "metrics":
        (bad / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    elif broken == "config":
        (bad / "config.json").write_text('{"model": 1}')
    elif broken == "empty":
        (bad / "metrics.jsonl").write_text("")
    record = compared(a, str(bad), b)
    assert [side["name"] for side in record["sides"]] == ["A", "C"]
    assert record["sides"][1]["source"] == b
    assert told in record["failed"][0]["told"]
    assert str(bad) in record["words"]
    json.dumps(record)


def test_a_folder_of_runs_of_several_recipes_is_no_side(tmp_path: Path) -> None:
    write_run(tmp_path / "both" / "x")
    write_run(tmp_path / "both" / "y", "--optimizer.lr=1.0", seed=43)
    _, failed = gather([Source(str(tmp_path / "both"))], 2, None)
    assert "x and y differ in optimizer.lr" in failed[0][1]


def test_lines_that_a_resume_superseded_are_left_out(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    lines = (b / "metrics.jsonl").read_text().splitlines(keepends=True)
    wrong = json.dumps({**json.loads(lines[50]), "loss": 99.0}) + "\n"
    (b / "metrics.jsonl").write_text("".join([*lines[:50], wrong, *lines[40:]]))
    assert pair_of(str(a), str(b))["loss"]["verdict"] == "equal"


def test_intervals() -> None:
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval.middle == 2.0
    assert interval.high - 2.0 == pytest.approx(9.925 / 3**0.5)
    assert not paired_interval([5.0]).excludes(0.0)
    welch = unpaired_interval([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (welch.middle, welch.high - 3.0) == (3.0, pytest.approx(4.604 * (2 / 3) ** 0.5))
    uneven = unpaired_interval([1.0, 2.0, 3.0], [4.0, 6.0, 5.0, 9.0, 1.0])  # of 5.3 degrees of freedom
    assert (uneven.middle, uneven.high - 3.0) == (3.0, pytest.approx(4.032 * (1 / 3 + 8.5 / 5) ** 0.5))
    assert unpaired_interval([1.0, 1.0], [2.0, 2.0]).bounds() == [1.0, 1.0]


def test_intervals_of_one_series() -> None:
    noise = random.Random(0)
    series = [noise.gauss(1.0, 0.1) for _ in range(3000)]
    around = block_bootstrap(series)
    assert around.low < 1.0 < around.high
    assert 0.005 < around.high - around.low < 0.012  # 0.0094 of independent values; few blocks make it narrower
    spoilt = block_bootstrap([*series[:99], 1000.0], of_medians=True)
    assert 0.9 < spoilt.low < spoilt.middle < spoilt.high < 1.1
    slow = [value for value in series[:20] for _ in range(10)]  # neighbours are alike
    wide, narrow = (block_bootstrap(each) for each in (slow, noise.sample(slow, len(slow))))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_paired_interval_covers_as_often_as_it_says() -> None:
    noise = random.Random(5)
    missed = sum(paired_interval([noise.gauss(0.0, 1.0) for _ in range(5)]).excludes(0.0) for _ in range(2000))
    assert 5 <= missed <= 40  # 20 of 2,000 are expected


def test_gather_refuses_nothing_silently(tmp_path: Path) -> None:
    sides, failed = gather([Source("train_configs/no_such.toml"), Source(str(write_run(tmp_path / "a")))], 2, None)
    assert [side.name for side in sides] == ["B"]
    assert "no such recipe" in failed[0][1]
    assert "no such run" in gather([Source("nowhere")], 2, None)[1][0][1]
