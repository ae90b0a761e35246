"""Commands as a user types them: what goes to stdout, what to stderr, with which exit code."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
from xxhash import xxh3_128

from tests.checkpoint.reading import contents
from tests.tiny import write_recipe
from torchtitan_lite import launch
from torchtitan_lite.checkpoint import report, storage
from torchtitan_lite.cli import main
from torchtitan_lite.config import JobConfig, load_config
from torchtitan_lite.config.document import config_lines, markdown
from torchtitan_lite.config.loading import leaf_names

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(ROOT.joinpath("train_configs").rglob("*.toml"))
HEAVY = ("torch", "tensorboard", "sentencepiece", "numpy", "transformers", "tqdm")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", tmp_path / "corpus", tmp_path / "cache")


@pytest.fixture
def package_logger() -> Iterator[None]:
    """Give the package's logger back as it was: commands send it to the streams of their own test."""
    logger = logging.getLogger("torchtitan_lite")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _strict_json(text: str) -> Any:
    """The one document that `text` is, by the letter of RFC 8259."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_show_prints_the_recipe_with_everything_filled_in(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(recipe), "--training.steps=7", "--job.description=x"]) == 0
    out, err = capsys.readouterr()
    expected = load_config(recipe, ["--training.steps=7", "--job.description=x"])
    assert out.splitlines() == config_lines(expected)
    assert "steps = 7  # default 10000" in out
    assert err == ""


def test_what_show_prints_is_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["config", "show", str(recipe), "--optimizer.lr=1e-5", "--world-size=2"])
    shown = _write(tmp_path / "shown.toml", capsys.readouterr().out)
    config = load_config(shown)
    assert config.optimizer.lr == 1e-5
    assert config.parallelism.data_parallel_shard_degree == 2


def test_show_for_a_world_size_adds_what_follows_from_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--training.global_batch_size=-1", "--lr_scheduler.total_steps=-1"]
    assert main(["config", "show", str(recipe), *overrides, "--world-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data_parallel_shard_degree = 4  # default -1" in lines
    assert "global_batch_size = 32  # default -1" in lines
    assert "total_steps = 20  # default -1" in lines
    assert "# mesh: 4 ranks: dp_shard 4" in lines
    assert "# batch: 32 samples of 32 = 1,024 tokens a step; a rank runs 1 x 8" in lines
    assert any(line.startswith("# model: tiny tiny, ") for line in lines)
    assert any(line.startswith("# schedule: 20 steps to a peak of 0.005: 2 warm-up, 0 stable, 18 ") for line in lines)


def test_show_json_is_one_document_on_stdout(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(recipe), "--json"]) == 0
    out, err = capsys.readouterr()
    shown = _strict_json(out)
    assert shown["config"] == asdict(load_config(recipe))
    assert (shown["derived"], shown["warnings"]) == ({}, [])
    assert err == ""

    assert main(["config", "show", str(recipe), "--json", "--world-size=2", "--training.steps=9"]) == 0
    shown = _strict_json(capsys.readouterr().out)
    assert shown["config"]["training"]["steps"] == 9
    assert shown["config"]["parallelism"]["data_parallel_shard_degree"] == 2
    assert list(shown["derived"]) == ["model", "mesh", "batch", "schedule", "kept"]
    assert shown["derived"]["mesh"] == "2 ranks: dp_shard 2"


def test_show_tells_what_a_recipe_extends_and_where_each_value_comes_from(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = _write(tmp_path / "middle.toml", f'extends = "{recipe.name}"\n[training]\nsteps = 7\nseq_len = 16\n')
    top = _write(tmp_path / "top.toml", 'extends = "middle.toml"\n[training]\nseq_len = 64\n')
    arguments = ["config", "show", str(top), "--optimizer.lr=1e-5", "--world-size=2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"# {top}, extends {middle}, extends {recipe}"
    assert main([*arguments, "--json"]) == 0
    shown = _strict_json(capsys.readouterr().out)
    assert shown["chain"] == [str(top), str(middle), str(recipe)]
    sources = shown["sources"]
    assert list(sources) == list(leaf_names(JobConfig))
    assert sources["training.seq_len"] == str(top)
    assert sources["training.steps"] == str(middle)
    assert sources["training.global_batch_size"] == str(recipe)
    assert sources["optimizer.lr"] == "--optimizer.lr=1e-5"
    assert sources["optimizer.eps"] == "default"


def test_docs_print_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "docs"]) == 0
    assert capsys.readouterr().out == markdown()


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_passes_its_check(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(shipped)]) == 0, capsys.readouterr().out


def test_there_are_shipped_recipes() -> None:
    assert SHIPPED


def test_check_says_of_each_recipe_what_it_comes_to(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = _write(tmp_path / "bad.toml", "[training]\nstpes = 1\n")
    assert main(["config", "check", str(recipe), str(bad)]) == 2
    good_line, bad_line = capsys.readouterr().out.splitlines()
    assert good_line.startswith(f"{recipe}  ok    tiny tiny, ")
    assert "1 rank" in good_line
    assert bad_line.startswith(f"{bad} ")
    assert "  FAIL  error: " in bad_line
    assert bad_line.endswith("unknown key training.stpes; did you mean training.steps?")
    # Columns stand under each other whatever the length of the names.
    assert good_line.index("  ok    ") == bad_line.index("  FAIL  ")


def test_check_takes_the_fewest_ranks_that_the_degrees_ask_for(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text()
    for degrees, ranks, mesh in [
        ("", 1, "1 rank"),
        ("data_parallel_replicate_degree = 3", 3, "3 ranks: dp_replicate 3"),
        (
            "data_parallel_replicate_degree = 2\ndata_parallel_shard_degree = 4",
            8,
            "8 ranks: dp_replicate 2 x dp_shard 4",
        ),
    ]:
        _write(recipe, f"{text}[parallelism]\n{degrees}\n")
        assert main(["config", "check", "--json", str(recipe)]) == 0
        (row,) = _strict_json(capsys.readouterr().out)
        assert (row["ok"], row["world_size"], row["derived"]["mesh"]) == (True, ranks, mesh)


def test_check_gives_experts_and_gathers_the_ranks_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = '[model]\nname = "qwen3"\nflavor = "debugmodel_moe"\n[parallelism]\nexpert_parallel_degree = 4\n'
    gathers = (
        '[model]\nconverters = ["quantize.linear.float8"]\n'
        "[quantize.linear.float8]\nenable_fsdp_float8_all_gather = true\n"
    )
    for text, mesh in [
        (moe, "4 ranks: dp_shard 4, ep 4 within"),
        (moe + "context_parallel_degree = 2\n", "4 ranks: dp_shard 2 x cp 2, ep 4 within"),
        (moe + "data_parallel_shard_degree = 8\n", "8 ranks: dp_shard 8, ep 4 within"),
        (gathers, "2 ranks: dp_shard 2"),
    ]:
        assert main(["config", "check", "--json", str(_write(tmp_path / "a.toml", text))]) == 0
        (row,) = _strict_json(capsys.readouterr().out)
        assert row["derived"]["mesh"] == mesh
    # Where the recipe says how many, it is held to it.
    fixed = _write(tmp_path / "b.toml", gathers + "[parallelism]\ndata_parallel_shard_degree = 1\n")
    assert main(["config", "check", str(fixed)]) == 2


def test_check_for_a_world_size_refuses_what_does_not_fit_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(recipe, recipe.read_text() + "[parallelism]\ndata_parallel_replicate_degree = 3\n")
    assert main(["config", "check", str(recipe), "--world-size=6"]) == 0
    assert "6 ranks: dp_replicate 3 x dp_shard 2" in capsys.readouterr().out
    assert main(["config", "check", str(recipe), "--world-size=4"]) == 2
    assert "FAIL  error: 4 ranks cannot be shared out" in capsys.readouterr().out


def test_check_json_is_one_document_on_stdout(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.toml"
    assert main(["config", "check", "--json", str(recipe), str(missing)]) == 2
    out, err = capsys.readouterr()
    good, bad = _strict_json(out)
    assert (good["recipe"], good["ok"], good["world_size"]) == (str(recipe), True, 1)
    assert list(good["derived"]) == ["model", "mesh", "batch", "schedule", "kept"]
    assert (bad["recipe"], bad["ok"]) == (str(missing), False)
    assert bad["error"].startswith(f"{missing}: no such recipe")
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"the following arguments are required: COMMAND; see torchtitan-lite --help"),
        (["trian"], r"argument COMMAND: invalid choice: 'trian' .*; see torchtitan-lite --help"),
        (["config"], r"the following arguments are required: ACTION; see torchtitan-lite config --help"),
        (["config", "show"], r"the following arguments are required: recipe; see torchtitan-lite config show --help"),
        (["config", "check"], r"the following arguments are required: RECIPE; see .*"),
        (["config", "show", "nowhere.toml"], r"nowhere\.toml: no such recipe"),
        (
            ["config", "show", "RECIPE", "--training.steps", "5"],
            r"argument --training\.steps: no value; write --training\.steps=VALUE in one word",
        ),
        (
            ["config", "show", "RECIPE", "training.steps=5"],
            r"argument training\.steps=5: expected --section\.key=value.*",
        ),
        (["config", "show", "RECIPE", "--steps=5"], r"argument --steps=5: expected --section\.key=value.*"),
        (["config", "show", "RECIPE", "--wrld-size=5"], r"argument --wrld-size=5: expected --section\.key=value.*"),
        (
            ["config", "show", "RECIPE", "--training.stpes=5"],
            r"--training\.stpes: unknown key training\.stpes; did you mean training\.steps\?",
        ),
        (["config", "show", "RECIPE", "--training.steps=0"], r"--training\.steps = 0: must be at least 1"),
        (
            ["config", "show", "RECIPE", "--world-size=0"],
            r"argument --world-size: 0: expected a whole number of at least 1; see torchtitan-lite config show --help",
        ),
        (["config", "show", "RECIPE", "--world-size=two"], r"argument --world-size: two: expected a whole number.*"),
        (["config", "show", "RECIPE", "--world-size"], r"argument --world-size: expected one argument; see .*"),
        (
            ["config", "show", "RECIPE", "--world-size=2", "--model.flavor=tinny"],
            r'model\.flavor = "tinny": tiny has tiny, tied; did you mean tiny\?',
        ),
        (
            ["config", "check", "RECIPE", "--training.steps=5"],
            r"argument --training\.steps=5: this command takes no .*",
        ),
        (["config", "docs", "--training.steps=5"], r"argument --training\.steps=5: this command takes no overrides"),
        (["config", "docs", "RECIPE"], r"argument .*tiny\.toml: expected --section\.key=value.*"),
        (["checkpoint"], r"the following arguments are required: ACTION; see torchtitan-lite checkpoint --help"),
        (
            ["checkpoint", "verify"],
            r"the following arguments are required: PATH; see torchtitan-lite checkpoint verify.*",
        ),
        (
            ["checkpoint", "verify", "nowhere"],
            r"nowhere: no such folder; name a checkpoint, a folder of some, or a run.*",
        ),
        (
            ["checkpoint", "list", ".", "--json"],
            r"\.: has no checkpoints; name a checkpoint, a folder of some, or a run.*",
        ),
        (["checkpoint", "list", ".", "--steps=2"], r"argument --steps=2: expected --section\.key=value.*"),
        (["prepare", "RECIPE"], r'training\.dataset_path = ".*corpus": no such file or folder.*'),
        (
            ["prepare", "RECIPE", "--model.name=gpt"],
            r'model\.spec = "tests\.tiny:SPEC" and model\.name = "gpt" both .*',
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    recipe: Path,
    package_logger: None,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main([str(recipe) if argument == "RECIPE" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {message}\n", err), err


def test_prepare_makes_the_corpus_ready_and_says_where(
    tmp_path: Path, corpus: Path, package_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", corpus, tmp_path / "cache")
    assert main(["prepare", str(recipe), "--data.validation_fraction=0.3"]) == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "cache").glob("corpus-*/")
    summary = json.loads((folder / "prepared.json").read_text())
    train, held_out = summary["train"]["tokens"], summary["validation"]["tokens"]
    assert train > held_out > 0
    assert out == f"{folder}: {train:,} training tokens, {held_out:,} held out\n"
    assert "tokenising 40 documents" in err

    # Once more: the same answer, nothing to do.
    assert main(["prepare", str(recipe), "--data.validation_fraction=0.3"]) == 0
    again, err = capsys.readouterr()
    assert (again, err) == (out, "")


@pytest.mark.parametrize("code", [0, 2, 130])
def test_train_hands_recipe_and_overrides_to_the_launcher(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    launched: list[list[str]] = []

    def launcher(arguments: list[str]) -> int:
        launched.append(arguments)
        return code

    monkeypatch.setattr(launch, "main", launcher)
    assert main(["train", str(recipe), "--training.steps=3", "--job.description=a b"]) == code
    assert launched == [[str(recipe), "--training.steps=3", "--job.description=a b"]]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config", "--help"], ["config", "show", "--help"], ["checkpoint", "verify", "--help"]]
)
def test_help_goes_to_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {' '.join(['torchtitan-lite', *arguments[:-1]])}")
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "show", "RECIPE", "--world-size=4"],
        ["config", "check", "RECIPE"],
        ["config", "docs"],
        ["config", "show", "nowhere.toml"],
    ],
)
def test_looking_at_recipes_imports_nothing_heavy(
    tmp_path: Path, corpus: Path, cache: Path, arguments: list[str]
) -> None:
    ours = {"spec": "", "flavor": "debugmodel"}  # a family from outside may import what it likes
    recipe = write_recipe(tmp_path / "ours.toml", corpus, cache, model=ours)
    command = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "torchtitan_lite", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (2 if "nowhere.toml" in arguments else 0), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torchtitan_lite.cli" in imported
    assert {name for name in imported if name.split(".")[0] in HEAVY} == set()


def _checkpoint(folder: Path) -> Path:
    final, name = storage.step_folder(folder, 4), storage.file_of(0)
    staging = storage.staging_folder(folder, 4)
    staging.mkdir(parents=True)
    (staging / name).write_bytes(b"abc")
    files = {name: {"bytes": 3, "xxh3_128": xxh3_128(b"abc").hexdigest()}}
    storage.publish(staging, final, contents(4, files=files))
    return final


@pytest.mark.parametrize("action", ["list", "verify"])
def test_checkpoint_json_is_one_document_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    final = _checkpoint(tmp_path)
    assert main(["checkpoint", action, str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    told = _strict_json(out)
    (row,) = told["checkpoints"] if action == "verify" else told
    assert (row["path"], err) == (str(final), "")


def test_a_bad_checkpoint_is_exit_code_1_and_its_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = _checkpoint(tmp_path)
    (final / storage.file_of(0)).write_bytes(b"abd")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"bad   {final / storage.file_of(0)}: expected 3 bytes with XXH3 ")
    assert out.splitlines()[-1].startswith("0 good, 1 bad; read ")
    assert err == ""
    # Its checksum is right, and it is no file of tensors.
    (final / storage.file_of(0)).write_bytes(b"abc")
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {final / storage.file_of(0)}: is no file of a checkpoint: .*\n", err)


def test_an_interrupted_verification_is_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkpoint(tmp_path)

    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report._Count, "add", lambda self, count: interrupted(count))
    assert main(["checkpoint", "verify", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("action", ["list", "verify"])
def test_looking_at_checkpoints_needs_no_torch_and_a_closed_pipe_is_quiet(tmp_path: Path, action: str) -> None:
    _checkpoint(tmp_path)
    program = "import sys; from torchtitan_lite.cli import main; code = main(sys.argv[1:])\n"
    program += "assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", program, "checkpoint", action, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141
