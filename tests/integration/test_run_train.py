"""run_train.sh as a user calls it: golden losses, resuming, mistakes, signals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.tiny import write_recipe
from torchtitan_lite import launch
from torchtitan_lite.checkpoint.storage import published_steps
from torchtitan_lite.observability.sinks import read_lines
from torchtitan_lite.run_record import read_stopped

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120

pytestmark = pytest.mark.slow


def _environment(**variables: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "LOG_RANK", "RANK")}
    return {**keep, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}


def _train(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "run_train.sh"), *arguments],
        cwd=cwd,
        env=_environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache, checkpoint={"enable": True, "interval": 4})


# Losses of the first steps on 2 ranks, float32, torch 2.13.0 on an AVX2 CPU. 1e-4 leaves room for another CPU's
# kernels and for nothing else: a refactoring keeps the losses, a change of numerics changes these lines and says so.
GOLDEN = [6.588450, 6.391880, 6.225587, 5.786915, 5.476558, 5.099355, 4.765055, 4.414326]


def test_losses_are_the_golden_ones_and_a_second_start_resumes(recipe: Path, tmp_path: Path) -> None:
    """From another folder than the project's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = ("../tiny.toml", "--job.dump_folder=here")
    first = _train(*settings, "--training.steps=8", cwd=elsewhere, NPROC="2")
    assert first.returncode == 0, first.stderr
    lines = read_lines(elsewhere / "here" / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(GOLDEN, rel=1e-4)
    *_, last = first.stdout.splitlines()
    assert "here" in last
    assert "--training.steps=16" in last

    done = _train(*settings, "--training.steps=8", cwd=elsewhere, NPROC="2")
    assert done.returncode == 0
    assert "already is at step 8 of 8" in done.stdout
    assert len(read_lines(elsewhere / "here" / "metrics.jsonl")) == 8

    more = _train(*settings, "--training.steps=12", cwd=elsewhere, NPROC="1", LOG_RANK="0")
    assert more.returncode == 0, more.stderr
    assert "resumed from step 8" in more.stdout
    assert [line["step"] for line in read_lines(elsewhere / "here" / "metrics.jsonl")] == list(range(1, 13))


def test_help_needs_no_setup() -> None:
    told = _train("--help", PYTHON="/nowhere")
    assert told.returncode == 0
    assert "NPROC" in told.stdout
    assert told.stderr == ""


def _mistakes(tmp_path: Path, corpus: Path, cache: Path) -> dict[str, tuple[list[str], dict[str, str], str]]:
    good = str(write_recipe(tmp_path / "good.toml", corpus, cache))
    model = {"spec": "tests.tiny:MOE", "flavor": "routed"}
    moe = str(write_recipe(tmp_path / "moe.toml", corpus, cache, model=model))
    (tmp_path / "broken.toml").write_text("[training]\nsteps = \n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").write_text("in the way")
    keys = ("tensor_parallel_degree=2", "enable_async_tensor_parallel=true")
    asynchronous = [f"--parallelism.{key}" for key in keys]
    return {
        "missing recipe": ([str(tmp_path / "goood.toml")], {}, r"no such recipe; did you mean good.toml\?"),
        "malformed TOML": ([str(tmp_path / "broken.toml")], {}, r"broken.toml: not valid TOML: .*line 2"),
        "unknown key": ([good, "--training.step=3"], {}, r"unknown key training.step; did you mean training.steps\?"),
        "wrong type": ([good, "--training.steps=many"], {}, r"--training.steps = \"many\": expected an integer"),
        "two words": ([good, "--training.steps", "3"], {}, r"no value; write --training.steps=VALUE"),
        "dense": ([good, "--parallelism.expert_parallel_degree=2"], {"NPROC": "2"}, r"it is dense; set it to 1"),
        "experts": ([moe, "--parallelism.expert_parallel_degree=3"], {"NPROC": "6"}, r"8 experts .*valid: 1, 2$"),
        "capacity": (
            [moe, "--moe.capacity_factor=0.01"],
            {},
            r"capacity_factor = 0.01 drops every token.*valid: 0.125",
        ),
        "choices": ([moe, "--model.flavor=greedy"], {}, r"top_k = 9, and there are 8 experts; valid: 1 to 8"),
        "heads": ([good, "--parallelism.tensor_parallel_degree=3"], {"NPROC": "3"}, r"does not divide n_heads"),
        "no GPU": (
            [good, *asynchronous, "--compile.enable=true"],
            {"NPROC": "2", "CUDA_VISIBLE_DEVICES": ""},
            r"needs CUDA's symmetric memory, and this machine has no accelerator; set it to false",
        ),
        "world size": (
            [good, "--parallelism.data_parallel_shard_degree=3"],
            {"NPROC": "2"},
            r"= 3 ranks, there are 2; use 3",
        ),
        "missing corpus": ([good, f"--training.dataset_path={tmp_path / 'gone'}"], {}, r"no such file or folder"),
        "empty corpus": ([good, f"--training.dataset_path={tmp_path / 'empty'}"], {}, r"no files in this folder"),
        "not UTF-8": ([good, f"--training.dataset_path={tmp_path / 'latin.txt'}"], {}, r"is not UTF-8 at byte 3"),
        "run folder": (
            [good, f"--job.dump_folder={tmp_path / 'file' / 'run'}"],
            {},
            r"cannot be made: Not a directory",
        ),
        "ranks": ([good], {"NPROC": "two"}, r"NPROC=two: expected a whole number"),
        "nodes": ([good], {"NNODES": "2"}, r"needs RDZV_ENDPOINT"),
        "rendezvous": ([good], {"NNODES": "2", "RDZV_ENDPOINT": "nope"}, r"RDZV_ENDPOINT=nope: expected HOST:PORT"),
        "log rank": ([good], {"LOG_RANK": "all"}, r"LOG_RANK=all: expected ranks below 1"),
        "log rank beyond": ([good], {"LOG_RANK": "7"}, r"LOG_RANK=7: expected ranks below 1"),
        "threads": ([good], {"OMP_NUM_THREADS": "4,2"}, r"OMP_NUM_THREADS=4,2: expected a whole number"),
        "user": ([good, "--job.dump_folder=~nobody-at-all/x"], {}, r"there is no such user"),
        "beta": ([good, "--optimizer.beta1=1.0"], {}, r"--optimizer.beta1 = 1.0: must be less than 1"),
        "timeout": ([good, "--comm.init_timeout_seconds=99999999999999"], {}, r"must be at most 604800"),
        "vocabulary": (
            [good, "--model.spec=", "--model.tokenizer_path=/dev/null"],
            {},
            r"flavor = \"tiny\": llama3 has",
        ),
    }


def test_mistakes_end_with_2_and_one_line_before_any_rank_starts(
    tmp_path: Path, corpus: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, where nothing is imported anew; one of them as a user would see it."""
    for name, (arguments, variables, message) in _mistakes(tmp_path, corpus, cache).items():
        with patch.dict(os.environ, _environment(**{"NPROC": "1", **variables}), clear=True):
            code = launch.main(arguments)
        (line,) = capfd.readouterr().err.splitlines()
        assert code == 2, (name, line)
        assert line.startswith("error: "), (name, line)
        assert re.search(message, line), (name, line)
    run = _train(*arguments, **{"NPROC": "1", **variables})
    assert (run.returncode, run.stderr) == (2, f"{line}\n")


def _without_privileges(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One process as of a user whom permissions bind: root's way around them is taken away."""
    command = [sys.executable, "-m", "torchtitan_lite.train", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or another user than root")
        around = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={around}", f"--inh-caps={around}", *command]
    return subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_a_checkpoint_without_permission_is_named_and_left_alone(recipe: Path, tmp_path: Path) -> None:
    assert _train(str(recipe), "--training.steps=2", NPROC="1").returncode == 0
    folder = tmp_path / "run" / "checkpoint"
    for what in ("step-00000002", "step-00000002/rank-00000.safetensors"):
        path = folder / what
        path.chmod(0)
        try:
            run = _without_privileges(str(recipe), "--training.steps=2")
        finally:
            path.chmod(0o755)
        assert run.returncode == 2, (what, run.stderr)
        (line,) = run.stderr.splitlines()
        assert f"{path}" in line
        assert "permissions" in line
        assert published_steps(folder) == [2]


def _start(recipe: Path) -> "subprocess.Popen[str]":
    """A run that takes for ever, in a process group of its own."""
    return subprocess.Popen(
        [
            str(ROOT / "run_train.sh"),
            str(recipe),
            "--training.steps=100000",
            "--lr_scheduler.total_steps=-1",
        ],
        cwd=ROOT,
        env=_environment(NPROC="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore it, and all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _read_until(process: "subprocess.Popen[str]", marker: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if marker in line:
            return
    raise AssertionError(f"the run ended before it said {marker}")


def _rest_of_output(process: "subprocess.Popen[str]", within: float) -> str:
    """What is still printed; its end is when the last rank has closed its output."""
    started = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < within, rest
    return rest


@pytest.mark.parametrize(
    ("sent", "to", "code"),
    [
        (signal.SIGINT, "launcher", 130),
        (signal.SIGUSR1, "rank", 138),
    ],
)
def test_a_signal_saves_the_step_and_ends_all_ranks(
    recipe: Path, tmp_path: Path, sent: signal.Signals, to: str, code: int
) -> None:
    process = _start(recipe)
    _read_until(process, "  loss")
    if to == "launcher":
        os.killpg(process.pid, sent)
    else:
        os.kill(int((tmp_path / "run" / ".lock").read_text()), sent)
    rest = _rest_of_output(process, within=10)
    assert process.returncode == code
    assert "Traceback" not in rest
    saved = published_steps(tmp_path / "run" / "checkpoint")[-1]
    assert f"stopped by {sent.name} at step {saved}; the next start resumes from step {saved}" in rest
    stopped = read_stopped(tmp_path / "run")
    assert stopped is not None
    assert (stopped["step"], stopped["saved"], stopped["signal"]) == (saved, saved, sent.name)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == saved, "the step just logged is saved"


def test_a_run_folder_takes_one_run_at_a_time(recipe: Path) -> None:
    process = _start(recipe)
    try:
        _read_until(process, "  loss")
        second = _train(str(recipe), NPROC="1")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM at step" in _rest_of_output(process, within=10)
    assert process.returncode == 143
    assert second.returncode == 2
    assert "is running in it; wait for it" in second.stderr


@pytest.mark.parametrize("delay", [1.0, 2.6])
def test_ctrl_c_during_start_up_ends_all_ranks_too(recipe: Path, delay: float) -> None:
    process = _start(recipe)
    time.sleep(delay)  # the moment is the point: imports, rendezvous, first step
    os.killpg(process.pid, signal.SIGINT)
    rest = _rest_of_output(process, within=10)
    assert process.returncode == 130, rest
    # An interpreter that is interrupted before it runs anything of ours says so in its own way.
    assert "Traceback" not in rest or "Fatal Python error: init" in rest


def test_ranks_go_with_a_launcher_that_is_killed(recipe: Path) -> None:
    process = _start(recipe)
    _read_until(process, "  loss")
    process.kill()
    _rest_of_output(process, within=10)


def test_a_rank_whose_launcher_is_gone_before_it_starts_does_not_start(recipe: Path) -> None:
    """It would hold the run folder while it looks for a store that is gone too."""
    gone = {"TORCHELASTIC_RUN_ID": "none", "TORCHTITAN_LITE_LAUNCHER": "1"}
    command = [sys.executable, "-m", "torchtitan_lite.train", str(recipe)]
    run = subprocess.run(command, cwd=ROOT, env=_environment(**gone), capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "")
