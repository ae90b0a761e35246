"""The command: what it runs, keeps, refuses and prints."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare.folders import write_run
from tests.corpus import write_corpus
from tests.tiny import write_recipe
from torchtitan_lite.cli import main
from torchtitan_lite.compare import launching
from torchtitan_lite.compare.conditions import judge, parse, require_sides
from torchtitan_lite.compare.sides import Side, Source, gather, key_of
from torchtitan_lite.compare.sweep import combinations
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import plan_job
from torchtitan_lite.recipe_diff import Side as Described

ROOT = Path(__file__).parent.parent.parent


def command(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_finished_runs_are_compared_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", "--activation_checkpoint.mode=full")
    assert command(a, b, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert re.search(r"B against A +equal", shown)
    assert "activation_checkpoint.mode" in shown
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    pair = record["pairs"][0]
    assert (pair["a"], pair["b"], pair["loss"]["verdict"]) == ("A", "B", "equal")
    assert pair["config_diff"] == {"activation_checkpoint": {"mode": ["none", "full"]}}
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_json_is_one_document_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert command(a, b, "--out", tmp_path / "out", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "B against A" in shown.err


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("B.loss ≈ A.loss", 0),
        ("B.loss == A.loss", 0),
        ("B.loss < A.loss", 1),
        ("B.loss > A.loss", 1),
        ("B.loss <= A.loss", 0),
        ("B.loss >= A.loss", 0),
        ("B.tps >= A.tps", 1),
        ("B.tps < A.tps", 0),
        ("B.tps <= A.tps", 0),
        ("B.tps > A.tps", 1),
        ("B.tps ~= A.tps", 1),
        ("B.memory >= A.memory", 0),
        ("B.memory > A.memory", 1),
        ("B.tps >= 0.5 * A.tps", 0),
        ("B.tps >= 0.9*A.tps", 1),
        ("B.memory <= A.memory", 0),
        ("B.memory < 0.5", 1),
        ("A.step_time_s < B.step_time_s", 0),
        ("A.step_time_s <= B.step_time_s", 0),
        ("A.step_time_s >= B.step_time_s", 1),
        ("B.step_time_s > A.step_time_s", 0),
        ("A.mfu > 0.4", 1),
    ],
)
def test_conditions_decide_the_exit_code(tmp_path: Path, condition: str, code: int) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", step_time_s=0.7)
    assert command(a, b, "--out", tmp_path / "out", "--assert", condition) == code
    judged = json.loads((tmp_path / "out" / "report.json").read_text())["assertions"]
    assert [each["holds"] for each in judged] == [code == 0]


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("B.step_time_s < A.step_time_s", 1),  # though its tokens/s are more
        ("B.step_time_s > A.step_time_s", 0),
        ("B.tps > A.tps", 0),
        ("B.tps ≈ A.tps", 1),
    ],
)
def test_conditions_on_steps_of_other_sizes_are_of_the_numbers(tmp_path: Path, condition: str, code: int) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", "--training.global_batch_size=16", step_time_s=0.6)
    assert command(a, b, "--out", tmp_path / "out", "--assert", condition) == code


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("B.loss > A.loss", 0),
        ("B.loss >= A.loss", 0),
        ("B.loss <= A.loss", 1),
        ("B.loss ≈ A.loss", 1),
        ("A.loss < B.loss", 0),
    ],
)
def test_conditions_on_a_loss_know_the_higher_one(tmp_path: Path, condition: str, code: int) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", "--optimizer.lr=1.0", loss=6.0)
    assert command(a, b, "--out", tmp_path / "out", "--assert", condition) == code


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("B.step_time_s <= A.step_time_s", 0),  # what two runs may differ by
        ("B.tps < A.tps", 0),  # of a rank: half
        ("B.tps >= A.tps", 1),
    ],
)
def test_conditions_on_runs_of_other_ranks(tmp_path: Path, condition: str, code: int) -> None:
    a, b = write_run(tmp_path / "a", ranks=1), write_run(tmp_path / "b", ranks=2, step_time_s=0.402)
    assert command(a, b, "--out", tmp_path / "out", "--assert", condition) == code


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("B.loss is A.loss", "is no condition"),
        ("B.los ≈ A.los", "no metric los; there are: loss"),
        ("B.loss < A.tps", "are different things"),
        ("B.memory ≈ A.memory", "where noise is known"),
        ("B.loss ≈ B.loss", "compares B with itself"),
        ("C.loss ≈ A.loss", "no side C; there are: A, B"),
    ],
)
def test_what_is_no_condition_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], condition: str, told: str
) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert command(a, b, "--out", tmp_path / "out", "--assert", condition) == 2
    assert told in capsys.readouterr().err


def test_a_condition_on_what_is_not_known_fails() -> None:
    condition = parse("B.loss <= A.loss")
    require_sides([condition], ["A", "B"])
    assert not judge(condition, {}, None)["holds"]
    other = {"loss": {"verdict": "not comparable", "told": "the data is another", "gap": None}}
    assert not judge(condition, {}, other)["holds"]
    other["loss"]["verdict"] = "different"
    assert not judge(parse("B.loss >= A.loss"), {}, other)["holds"]
    assert not judge(parse("B.tps > 1"), {"B": {"tps": None}}, None)["holds"]


def test_vary_makes_every_combination_and_refused_ones_are_named(tmp_path: Path) -> None:
    recipe = str(ROOT / "train_configs/llama3_debug.toml")
    sources = combinations(recipe, ["parallelism.tensor_parallel_degree=1,2,3", "compile.enable=false,true"])
    assert [source.label for source in sources][:2] == [
        "tensor_parallel_degree=1, enable=false",
        "tensor_parallel_degree=1, enable=true",
    ]
    assert sources[-1].overrides == ("--parallelism.tensor_parallel_degree=3", "--compile.enable=true")
    sides, refused = gather(sources, 2, 4)
    assert [side.name for side in sides] == ["A", "B", "C", "D"]
    assert [source.name for source, _ in refused] == ["E", "F"]
    assert [source.overrides[0] for source, _ in refused] == ["--parallelism.tensor_parallel_degree=3"] * 2
    assert "does not divide" in refused[0][1]
    assert combinations(recipe, ['model.converters=[],["x,y"]'])[1].overrides == ('--model.converters=["x,y"]',)


@pytest.mark.parametrize(
    ("varied", "told"),
    [
        (["training.seq_len"], "no value"),
        (["training.seq_len=1"], "one value varies nothing"),
        (["training.seq_len=1,,2"], "a value is empty"),
        (["training.seq_len=1,1"], "named twice"),
        (["debug.seed=1,2"], "seeds of their own"),
        (["training.seq_len=1,2", "training.seq_len=3,4"], "named twice"),
        ([f"training.seq_len={','.join(map(str, range(1, 70)))}"], "64 at most"),
    ],
)
def test_vary_refuses(varied: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        combinations("x.toml", varied)


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, recipe = str(write_run(tmp_path / "a")), str(ROOT / "train_configs/llama3_debug.toml")
    for arguments, told in (
        ([a], "alone it is compared with nothing"),
        ([a, tmp_path / "none"], "nothing is left to compare"),
        ([a, a, "--vary", "training.seq_len=1,2"], "name one .toml file"),
        ([recipe, "--vary", "parallelism.tensor_parallel_degree=3,5"], "nothing is left to compare"),
        ([recipe, "--vary", "training.sequence=3,5"], "unknown key training.sequence"),
        ([a, a, "--repeats", "0"], "at least 1"),
        ([a, a, "--out", "/proc/none"], "choose another"),
        ([a, a, "--out", ""], "--out is empty"),
        ([a, a, "--steps", "7"], "--steps 7: nothing is run"),
        ([a, a, "--nproc", "2"], "--nproc 2: nothing is run"),
        ([a, a, "--repeats", "5"], "--repeats 5: nothing is run"),
        ([a, a, "--target-loss", "nan"], "nan: expected a number"),
        ([a, a, "--target-loss", "inf"], "inf: expected a number"),
        ([a, a, "--target-loss", "low"], "low: expected a number"),
    ):
        assert command(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert told in lines[-1]
        assert lines[-1].startswith("error: ")


def test_letters_go_by_place_and_a_condition_on_what_failed_fails(tmp_path: Path) -> None:
    mine, slow = write_run(tmp_path / "mine"), write_run(tmp_path / "slow", step_time_s=0.7)
    conditions = ("B.tps >= 0.95 * A.tps", "A.tps > 1", "C.tps <= B.tps", "C.loss ≈ A.loss")
    asserted = [word for each in conditions for word in ("--assert", each)]
    assert command(tmp_path / "nope", mine, slow, *asserted, "--out", tmp_path / "out") == 1
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(side["name"], side["label"]) for side in record["sides"]] == [("B", "mine"), ("C", "slow")]
    assert [each["name"] for each in record["failed"]] == ["A"]
    assert [each["holds"] for each in record["assertions"]] == [False, False, True, False]
    assert "A is not there to be judged: " in record["assertions"][0]["told"]
    assert "no such run" in record["assertions"][3]["told"]


def test_a_condition_on_the_last_one_that_failed_fails_too(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert command(a, b, tmp_path / "nope", "--assert", "C.tps > 1", "--out", tmp_path / "out") == 1
    assert command(a, b, tmp_path / "nope", "--assert", "D.tps > 1", "--out", tmp_path / "out") == 2


def test_findings_outlast_a_page_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumbles(_: Any) -> str:
        raise RuntimeError("the page")

    monkeypatch.setattr("torchtitan_lite.compare.command.html", stumbles)
    with pytest.raises(RuntimeError, match="the page"):
        command(write_run(tmp_path / "a"), write_run(tmp_path / "b"), "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pairs"][0]["loss"]["verdict"] == "equal"


def test_what_is_sent_is_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with (b / "events.jsonl").open("a") as file:
        file.write('{"event": "traffic", "step": 2, "time": 0, "attempt": 1, "sent_gib": 0.0312}\n')
    assert command(a, b, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    head, first, second = [line for line in shown.splitlines() if line.strip()][:3]
    at = head.index("sent a step")
    assert (first[at:].split()[0], second[at:].split()[0]) == ("n/a", "0.0312")
    assert "The first rank of B sends 0.0312 GiB a step." in shown


@pytest.mark.parametrize(("loss", "said"), [(4.3, "higher"), (3.7, "lower")])
def test_the_words_say_which_way_a_loss_differs(tmp_path: Path, loss: float, said: str) -> None:
    for seed in (42, 43, 44):
        write_run(tmp_path / "a" / str(seed), seed=seed)
        write_run(tmp_path / "b" / str(seed), "--optimizer.lr=0.5", seed=seed, loss=loss)
    assert command(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    pair = json.loads((tmp_path / "out" / "report.json").read_text())["pairs"][0]
    assert pair["loss"]["verdict"] == "different"
    assert re.search(rf"The loss of B is 0\.\d+ {said} ", pair["words"])


class Launcher:
    """Takes the place of training: writes what a run would have written."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.told: dict[str, list[str]] = {}
        self.folders: list[Path] = []
        self.fails_on = self.stops_on = ""

    def __call__(self, side: Any, overrides: list[str], folder: Path, ranks: int, at_step: Any, stop: Any) -> Any:
        values = dict(each[2:].split("=", 1) for each in overrides)
        self.started.append((side.name, int(values["debug.seed"])))
        self.told[side.name] = overrides
        self.folders.append(folder)
        if self.stops_on == side.name:
            stop.asked = True
            return 130, None, []
        if side.name in self.fails_on:
            return 1, None, ["error: rank 1 failed first, with SIGKILL"]
        mark = (folder / "compare.json").read_text()
        (folder / "compare.json").unlink()
        folder.rmdir()
        own = ("--job.", "--debug.seed", "--training.steps")
        write_run(
            folder, *(each for each in overrides if not each.startswith(own)), seed=int(values["debug.seed"]), steps=4
        )
        (folder / "compare.json").write_text(mark)
        at_step(4)
        return 0, 1.5, []


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr(launching, "_launched", fake)
    monkeypatch.setattr("torchtitan_lite.compare.command._prepare", lambda *_: None)
    return fake


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    base = ROOT / "train_configs/llama3_debug.toml"
    found = []
    for name, mode in (("plain", "none"), ("full", "full")):
        path = tmp_path / f"{name}.toml"
        path.write_text(f'extends = "{base}"\n[activation_checkpoint]\nmode = "{mode}"\n')
        found.append(str(path))
    return found


def test_recipes_run_in_turns_and_finished_ones_stay(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    arguments = [*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 3, "--nproc", 2]
    assert command(*arguments) == 0
    assert launcher.started == [("A", 42), ("B", 42), ("B", 43), ("A", 43), ("A", 44), ("B", 44)]
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [len(side["runs"]) for side in record["sides"]] == [3, 3]
    assert record["sides"][0]["summary"]["first_step_s"] == 1.5
    launcher.started.clear()
    assert command(*arguments) == 0
    assert launcher.started == []
    assert command(*arguments[:-3], 4, "--nproc", 2) == 0
    assert launcher.started == [("B", 45), ("A", 45)]


def test_one_recipe_named_twice_runs_twice(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    same = tmp_path / "again" / "plain.toml"
    same.parent.mkdir()
    same.write_text(Path(recipes[0]).read_text())
    options = ("--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2)
    assert command(recipes[0], same, recipes[0], *options) == 0
    assert launcher.started == [("A", 42), ("B", 42), ("C", 42)]
    assert len(set(launcher.folders)) == 3
    launcher.started.clear()
    # Another before it leaves it what has run.
    assert command(recipes[1], recipes[0], same, recipes[0], *options) == 0
    assert launcher.started == [("A", 42)]


OFF = "--checkpoint.enable=false"


def test_nothing_is_saved_unless_saving_is_what_differs(
    tmp_path: Path, launcher: Launcher, recipes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    without = tmp_path / "without.toml"
    without.write_text(f'extends = "{recipes[0]}"\n[checkpoint]\nenable = false\n')
    options = ("--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2)
    assert command(*recipes, *options) == 0
    assert all(OFF in told for told in launcher.told.values())
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert OFF in record["sides"][0]["given"]
    assert f"--metrics.log_freq=1 {OFF}" in record["words"]
    assert f"each run: --training.steps=4 --metrics.log_freq=1 {OFF}, on 2 ranks" in capsys.readouterr().err
    assert command(recipes[0], without, *options) == 0
    assert not any(OFF in told for told in launcher.told.values())
    pair = json.loads((tmp_path / "out" / "report.json").read_text())["pairs"][0]
    assert pair["config_diff"] == {"checkpoint": {"enable": [True, False]}}
    assert command(recipes[0], "--vary", "checkpoint.enable=true,false", *options) == 0
    assert OFF not in launcher.told["A"]


def test_recipes_beside_a_run_that_saved_save_too(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    options = ("--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2)
    assert command(recipes[0], write_run(tmp_path / "a", steps=4), *options) == 0
    assert OFF not in launcher.told["A"]
    assert command(recipes[0], write_run(tmp_path / "b", OFF, steps=4), *options) == 0
    assert OFF in launcher.told["A"]


def test_all_recipes_log_as_often(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    rarely = tmp_path / "rarely.toml"
    rarely.write_text(f'extends = "{recipes[0]}"\n[metrics]\nlog_freq = 10\n[training]\nsteps = 1000\n')
    assert command(recipes[1], rarely, "--out", tmp_path / "out", "--repeats", 1, "--nproc", 2) == 0
    assert all("--metrics.log_freq=1" in told for told in launcher.told.values())


@pytest.mark.parametrize("changed", ["ranks", "data", "torch"])
def test_what_runs_were_of_decides_whether_they_are_kept(
    tmp_path: Path, launcher: Launcher, recipes: list[str], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    arguments = [*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc"]
    assert command(*arguments, 2) == 0
    launcher.started.clear()
    if changed == "data":

        def prepare(sides: Any, _: Any) -> None:
            for side in sides:
                side.identity = {"data": "edited"}

        monkeypatch.setattr("torchtitan_lite.compare.command._prepare", prepare)
    elif changed == "torch":
        monkeypatch.setattr("torchtitan_lite.compare.sides.versions", lambda: {"torch": "9.9"})
    assert command(*arguments, 1 if changed == "ranks" else 2) == 0
    assert launcher.started == [("A", 42), ("B", 42)]


def test_ranks_alone_are_in_the_key_of_a_run(recipes: list[str]) -> None:
    one, two = (plan_job(recipes[0], ["--parallelism.data_parallel_shard_degree=1"], ranks) for ranks in (1, 1))
    moved = replace(two, dims=replace(two.dims, dp_replicate=2))
    assert key_of(one, 42, {}) == key_of(two, 42, {})
    assert key_of(one, 42, {}) != key_of(moved, 42, {})


def test_where_nothing_ran_the_report_is_kept_and_the_exit_code_2(
    tmp_path: Path, launcher: Launcher, recipes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fails_on = "AB"
    assert command(*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: nothing could be compared: A (plain): rank 1 failed first")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["pairs"] == []
    assert (tmp_path / "out" / "report.html").exists()


def test_the_first_step_is_the_first_that_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trains.py"
    script.write_text(
        "import time\nprint('begun\\n step  1/3  loss 4.0', flush=True)\n"
        "time.sleep(1.5)\nprint(' step  2/3  loss 3.9', flush=True)\n"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", tmp_path / "python")
    side, steps = Side("A", "x", Source("x.toml"), None, Described("", {}, {}, (), None)), list[int]()
    code, first, lines = launching._launched(side, [], tmp_path / "repeat-0", 1, steps.append, launching._Stop())
    assert (code, steps) == (0, [1, 2])
    assert first is not None
    assert 0 < first < 1.5
    assert lines[-1] == " step  2/3  loss 3.9"


def test_a_recipe_that_changed_runs_again(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    arguments = [*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2]
    assert command(*arguments) == 0
    launcher.started.clear()
    Path(recipes[1]).write_text(Path(recipes[1]).read_text() + "[optimizer]\nlr = 0.5\n")
    assert command(*arguments) == 0
    assert launcher.started == [("B", 42)]


def test_what_was_stopped_goes_on(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    arguments = [*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 2, "--nproc", 2]
    launcher.stops_on = "B"
    assert command(*arguments) == 130
    assert launcher.started == [("A", 42), ("B", 42)]
    assert (tmp_path / "out" / "report.html").exists()
    launcher.stops_on = ""
    launcher.started.clear()
    assert command(*arguments) == 0
    assert launcher.started == [("B", 42), ("B", 43), ("A", 43)]


def test_a_recipe_that_fails_is_named_and_tried_once(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    launcher.fails_on = "A"
    third = tmp_path / "third.toml"
    third.write_text(f'extends = "{recipes[0]}"\n[training]\nloss_chunks = 2\n')
    arguments = [*recipes, third, "--out", tmp_path / "out", "--steps", 4, "--repeats", 2, "--nproc", 2]
    assert command(*arguments) == 0
    assert [name for name, _ in launcher.started] == ["A", "B", "C", "C", "B"]
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(pair["a"], pair["b"]) for pair in record["pairs"]] == [("B", "C")]
    assert "rank 1 failed first, with SIGKILL" in record["sides"][0]["runs"][0]["told"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, launcher: Launcher, recipes: list[str]) -> None:
    arguments = [*recipes, "--out", tmp_path / "out", "--steps", 4, "--repeats", 1, "--nproc", 2]
    assert command(*arguments) == 0
    folder = next((tmp_path / "out" / "runs").glob("plain-*/repeat-0"))
    (folder / "compare.json").unlink()
    assert command(*arguments) == 2
    assert (folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_runs_for_real(tmp_path: Path) -> None:
    (corpus := tmp_path / "corpus").mkdir()
    recipe = write_recipe(tmp_path / "tiny.toml", write_corpus(corpus), tmp_path / "cache")
    arguments = [
        recipe,
        "--vary",
        "activation_checkpoint.mode=none,full",
        "--steps",
        "8",
        "--repeats",
        "1",
        "--nproc",
        "1",
    ]
    told = [sys.executable, "-m", "torchtitan_lite", "compare", *arguments, "--out", tmp_path / "out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Stopped in the first run, which is then run again.
    begun = subprocess.Popen(
        list(map(str, told)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("runs/*/*/config.json")):
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, errors = begun.communicate(timeout=60)
    assert begun.returncode == 130, errors.decode()
    assert b"the same command goes on" in errors
    assert b"Traceback" not in errors
    done = subprocess.run(told, env=environment, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    record = json.loads(done.stdout)
    assert [len(side["runs"][0]["curve"]["loss"]) for side in record["sides"]] == [8, 8]
    loss = record["pairs"][0]["loss"]
    assert (loss["verdict"], loss["gap"], loss["envelope"]) == ("equal", 0.0, 0.0)
    assert 1.0 < record["sides"][0]["summary"]["first_step_s"] < 60
