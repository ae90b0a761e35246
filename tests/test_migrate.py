"""`torchtitan-lite config migrate` and `config diff`, as commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.cli import main
from torchtitan_lite.config import load_config

OLD = """\
[model]
name = "llama3"
flavor = "debugmodel"
[metrics]
enable_wandb = true
[parallelism]
context_parallel_rotate_method = "alltoall"
"""


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_migrate_writes_a_recipe_that_its_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _write(tmp_path / "old.toml", OLD), tmp_path / "new.toml"
    assert main(["config", "migrate", str(old), "--out", str(new)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "kept     2 keys as they are"
    assert any(line.startswith("warning: dropped  metrics.enable_wandb = true: there is no W") for line in lines)
    assert any(line.startswith('changed  parallelism.context_parallel_rotate_method = "alltoall": ') for line in lines)
    assert lines[-1] == "check    `config check` accepts it: 1 rank"
    assert "has no effect while parallelism.context_parallel_degree = 1" in lines[-2]
    assert main(["config", "check", str(new)]) == 0
    assert load_config(new).parallelism.context_parallel_rotate_method == "alltoall"


def test_migrate_without_out_prints_the_recipe_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "migrate", str(_write(tmp_path / "old.toml", OLD))]) == 0
    out = capsys.readouterr().out
    assert main(["config", "check", str(_write(tmp_path / "new.toml", out))]) == 0


def test_migrate_json_has_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "migrate", str(_write(tmp_path / "old.toml", OLD)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    actions = {each["key"]: each["action"] for each in found["keys"]}
    assert actions["model.name"] == "kept"
    assert actions["metrics.enable_wandb"] == "dropped"
    assert found["recipe"].startswith("[model]\n")
    assert (found["out"], found["check"]["ok"], found["check"]["mesh"]) == (None, True, "1 rank")


def test_what_the_rules_refuse_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _write(tmp_path / "old.toml", '[model]\nname = "llama4"\n')
    assert main(["config", "migrate", str(old)]) == 0
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith('warning: check    `config check` refuses it: model.name = "llama4": there are llama3, qwen3')
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nsteps =\n", "error: {old}: not valid TOML: Invalid value (at line 2, column 8)"),
        ("[training\n", "error: {old}: not valid TOML: "),
        ("steps = 1\nsteps = 2\n", "error: {old}: not valid TOML: Cannot overwrite a value (at line 2, "),
        (None, "error: {old}: no such recipe"),
    ],
)
def test_what_cannot_be_read_exits_2(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = tmp_path / "old.toml", tmp_path / "new.toml"
    if text is not None:
        _write(old, text)
    assert main(["config", "migrate", str(old), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message.format(old=old))
    assert not out.exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _write(tmp_path / "old.toml", OLD)
    assert main(["config", "migrate", str(old), "--out", str(old)]) == 2
    assert f"--out {old}: is there already; choose another name or remove it" in capsys.readouterr().err
    assert main(["config", "migrate", str(old), "--out", str(tmp_path / "no" / "new.toml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert old.read_text() == OLD


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _write(tmp_path / "base.toml", "[training]\nsteps = 20\nglobal_batch_size = 4\n[optimizer]\nlr = 1e-3\n")


def _diff(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["config", "diff", *map(str, arguments), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_diff_groups_by_section(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = _write(tmp_path / "other.toml", 'extends = "base.toml"\n[training]\nsteps = 30\nmax_norm = inf\n')
    assert main(["config", "diff", str(base), str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"a  {base}",
        f"b  {other}",
        "",
        "[training]",
        "max_norm  1.0 -> inf",
        "steps     20 -> 30",
    ]
    found = _diff(capsys, base, other)
    assert found["config"] == {"training": {"max_norm": [1.0, "inf"], "steps": [20, 30]}}
    assert (found["derived"], found["world_size"]) == ({}, [None, None])


def test_diff_for_a_world_size_sets_apart_what_follows(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _write(tmp_path / "other.toml", 'extends = "base.toml"\n[training]\nsteps = 30\n')
    found = _diff(capsys, base, other, "--world-size=2")
    assert found["config"] == {"training": {"steps": [20, 30]}}
    assert set(found["derived"]) == {"job.dump_folder", "lr_scheduler.total_steps", "schedule"}
    assert found["derived"]["lr_scheduler.total_steps"] == [20, 30]


def test_diff_of_a_recipe_with_itself_says_so(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "diff", str(base), str(base), "--world-size=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no difference"


def _run_folder(folder: Path, recipe: Path, ranks: int) -> Path:
    from torchtitan_lite.preflight import plan_job
    from torchtitan_lite.run_record import write_config_json

    plan = plan_job(recipe, [f"--job.dump_folder={folder}"], ranks)
    folder.mkdir()
    write_config_json(plan, {}, "cpu")
    return folder


def test_diff_takes_runs_and_resolves_a_recipe_as_the_run_beside_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_folder(tmp_path / "run", base, 4)
    found = _diff(capsys, run / "config.json", base)
    assert found["world_size"] == [4, 4]
    assert found["config"] == {"job": {"dump_folder": [str(run), "outputs/base"]}}
    assert found["derived"] == {}
    # What one side alone left open is no consequence.
    assert _diff(capsys, base, run)["config"] == {"job": {"dump_folder": ["outputs/base", str(run)]}}

    other = _run_folder(tmp_path / "other", base, 2)
    found = _diff(capsys, run, other)
    assert found["world_size"] == [4, 2]
    assert list(found["config"]) == ["job"]
    assert found["derived"]["parallelism.data_parallel_shard_degree"] == [4, 2]
    assert found["derived"]["world_size"] == [4, 2]


def test_diff_names_what_is_no_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in [
        (tmp_path, f"error: {tmp_path / 'config.json'}: no such file; name a recipe, or the folder of a run"),
        (_write(tmp_path / "a.json", "{"), "a.json: is not a config.json of ours"),
        (_write(tmp_path / "b.json", "[]"), "b.json: is not a config.json of ours"),
        (_write(tmp_path / "c.json", "{}"), "c.json: is not a config.json of ours"),
        (tmp_path / "d.toml", "d.toml: no such recipe"),
    ]:
        assert main(["config", "diff", str(path), str(base)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
