"""What can be known before a process group starts: the plan of a job, and whether its run folder fits it."""

import json
import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from tests.checkpoint.reading import contents
from tests.corpus import write_corpus
from tests.tiny import SPEC, TINY, write_recipe
from torchtitan_lite import train
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import JobPlan, finished_step, identity, plan_job, prepare_job, run_folder_held
from torchtitan_lite.run_record import write_config_json


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, cache)


def _started(recipe: Path, *overrides: str) -> JobPlan:
    """The plan of a run that has written its config.json."""
    plan = plan_job(recipe, overrides, 1)
    write_config_json(plan, identity(plan, prepare_job(plan)), "CPU")
    return plan


def _checkpoint(plan: JobPlan, step: int) -> None:
    staging = storage.staging_folder(plan.checkpoint_folder, step)
    staging.mkdir(parents=True)
    storage.publish(staging, storage.step_folder(plan.checkpoint_folder, step), contents(step))


def test_a_plan_holds_the_recipe_resolved_for_the_world_size(recipe: Path, tmp_path: Path) -> None:
    overrides = ["--training.global_batch_size=-1", "--lr_scheduler.total_steps=-1"]
    plan = plan_job(recipe, [*overrides, "--parallelism.data_parallel_replicate_degree=2"], 6)
    assert (plan.dims.dp_replicate, plan.dims.dp_shard, plan.dims.batch_ranks) == (2, 3, 6)
    assert plan.config.parallelism.data_parallel_shard_degree == 3
    assert plan.config.training.global_batch_size == 8 * 6
    assert plan.config.lr_scheduler.total_steps == 20
    assert plan.config.job.dump_folder == str(tmp_path / "run")
    assert (plan.batch.global_batch_size, plan.batch.microbatches, plan.batch.microbatch_size) == (48, 1, 8)
    assert (plan.schedule.peak, plan.schedule.warmup, plan.schedule.decay) == (5e-3, 2, 18)
    assert (plan.spec, plan.model_args) == (SPEC, TINY)
    assert plan.folder == tmp_path / "run"
    assert plan.checkpoint_folder == tmp_path / "run" / "checkpoint"
    assert plan.tokens_per_step == 48 * 32
    assert plan.recipe == recipe


def test_a_batch_is_shared_out_over_ranks_that_do_not_divide_it(recipe: Path) -> None:
    plan = plan_job(recipe, ["--training.local_batch_size=2"], 3)
    assert [len(plan.batch.share(rank)) for rank in range(3)] == [3, 3, 2]
    assert (plan.batch.microbatches, plan.batch.microbatch_size) == (2, 2)


def test_planning_touches_no_file(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan_job(recipe, [], 1)
    plan_job(recipe, [f"--training.dataset_path={tmp_path / 'nowhere'}"], 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_is_frozen(recipe: Path) -> None:
    plan = plan_job(recipe, [], 1)
    with pytest.raises(FrozenInstanceError):
        plan.folder = Path("elsewhere")  # type: ignore[misc]


def test_the_run_folder_is_named_after_the_recipe_by_default(tmp_path: Path) -> None:
    recipe = tmp_path / "some_name.toml"
    recipe.write_text("")
    plan = plan_job(recipe, [], 1)
    assert plan.folder == Path("outputs/some_name")
    assert plan.config.job.dump_folder == "outputs/some_name"


def test_what_follows_is_told_in_words(recipe: Path) -> None:
    derived = dict(plan_job(recipe, [], 2).derived())
    assert derived == {
        "model": f"tiny tiny, {TINY.parameter_count():,} parameters",
        "mesh": "2 ranks: dp_shard 2",
        "batch": "8 samples of 32 = 256 tokens a step; a rank runs 1 x 4",
        "schedule": "20 steps to a peak of 0.005: 2 warm-up, 0 stable, 18 linear decay",
        "kept": "0.5 MiB of a micro-batch in each of 3 blocks",
    }
    for arguments, kept in (
        (
            ["mode=selective"],
            "0.5 MiB of a micro-batch in each of 2 blocks, 0.0 MiB of a micro-batch in each of 1 blocks",
        ),
        (["mode=full"], "0.0 MiB of a micro-batch in each of 3 blocks, 0.5 MiB without checkpointing"),
    ):
        overrides = [f"--activation_checkpoint.{argument}" for argument in arguments]
        assert dict(plan_job(recipe, overrides, 2).derived())["kept"] == kept


def test_what_blocks_keep_in_bfloat16_is_told_for_a_gpu_wherever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).parents[1] / "train_configs" / "llama3_8b.toml"

    def kept(gpus: str, precision: str) -> str:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        return dict(plan_job(recipe, [f"--training.mixed_precision_param={precision}"], 8).derived())["kept"]

    assert kept("", "bfloat16") == f"{kept('0', 'bfloat16')}; on a GPU, as bfloat16 is for"
    assert "on a GPU" not in kept("", "float32")
    assert kept("", "float32") != kept("0", "float32")


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["--training.steps=0"], 1, r"^--training\.steps = 0: must be at least 1"),
        (["--lr_scheduler.total_steps=19"], 1, r"total_steps = 19 ends before training\.steps = 20"),
        (["--parallelism.data_parallel_replicate_degree=3"], 4, r"^4 ranks cannot be shared out"),
        (["--parallelism.data_parallel_shard_degree=2"], 4, r"= 2 ranks, there are 4"),
        (
            ["--parallelism.expert_parallel_degree=2"],
            2,
            r"expert_parallel_degree = 2: tiny tiny has no expert parallelism: it is dense; set it to 1$",
        ),
        (["--parallelism.expert_parallel_degree=3"], 2, r"expert_parallel_degree = 3: .* it is dense; set it to 1$"),
        (["--model.flavor=large"], 1, r'model\.flavor = "large": tiny has tiny, tied'),
        (
            ["--training.seq_len=513"],
            1,
            r"^training\.seq_len = 513 is longer than the 512 positions of tiny tiny; shorten it$",
        ),
        (
            ["--parallelism.fsdp_reshard_after_forward=never"],
            1,
            r'^parallelism\.fsdp_reshard_after_forward = "never": no parameters are sharded on 1 rank, .*at "default"',
        ),
        (
            [
                "--parallelism.fsdp_reshard_after_forward=always",
                "--parallelism.data_parallel_replicate_degree=2",
            ],
            2,
            r'_after_forward = "always": no parameters are sharded on 2 ranks: dp_replicate 2, there is nothing',
        ),
    ],
)
def test_what_cannot_run_is_refused(recipe: Path, overrides: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_job(recipe, overrides, ranks)


def test_limits_themselves_pass(recipe: Path) -> None:
    plan_job(recipe, ["--training.seq_len=512"], 1)
    plan_job(recipe, ["--parallelism.fsdp_reshard_after_forward=never"], 2)
    plan_job(recipe, ["--lr_scheduler.total_steps=20"], 1)


def test_preparing_makes_the_run_folder_and_the_corpus(recipe: Path, tmp_path: Path, cache: Path) -> None:
    plan = plan_job(recipe, [f"--job.dump_folder={tmp_path / 'a' / 'deep' / 'run'}"], 1)
    prepared = prepare_job(plan)
    assert list(plan.folder.iterdir()) == []
    assert prepared.sources[0].folder.parent == cache
    assert prepared.sources[0].vocab_size == TINY.vocab_size
    assert prepare_job(plan) == prepared


def test_a_run_folder_that_cannot_be_made_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(UserError) as raised:
            prepare_job(plan_job(recipe, [f"--job.dump_folder={folder}"], 1))
        assert str(raised.value) == f'job.dump_folder = "{folder}": cannot be made: {reason}; choose another'


def test_a_run_folder_that_cannot_be_written_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The superuser may write anywhere, so the permission itself is stood in for.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "run")
    with pytest.raises(UserError, match=r'^job\.dump_folder = ".*run": is not writable; choose another or change'):
        prepare_job(plan_job(recipe, [], 1))


def test_a_corpus_without_a_sample_is_refused(recipe: Path, tmp_path: Path, cache: Path) -> None:
    tokenizer = prepare_job(plan_job(recipe, [], 1)).tokenizer_path
    small = tmp_path / "small.txt"
    small.write_text("The river follows.")
    overrides = [f"--training.dataset_path={small}", f"--model.tokenizer_path={tokenizer}"]
    with pytest.raises(UserError, match=r"^training\.seq_len = 32: the training part of the corpus has \d+ tokens"):
        prepare_job(plan_job(recipe, overrides, 1))


def test_a_held_out_part_without_a_sample_is_refused_only_where_it_is_used(recipe: Path) -> None:
    # No name's hash is that small.
    tiny_part = "--data.validation_fraction=1e-9"
    prepare_job(plan_job(recipe, [tiny_part], 1))
    with pytest.raises(UserError, match=r"^validation\.enable = true: the held-out part has 0 documents with 0 tokens"):
        prepare_job(plan_job(recipe, [tiny_part, "--validation.enable=true"], 1))


def test_the_identity_is_what_may_not_change(recipe: Path) -> None:
    plan = plan_job(recipe, [], 1)
    prepared = prepare_job(plan)
    found = identity(plan, prepared)
    assert found["model"]["name"] == "tiny"
    assert (found["model"]["dim"], found["model"]["n_layers"], found["model"]["tied"]) == (64, 3, False)
    assert found["tokenizer"] == prepared.tokenizer_fingerprint
    assert found["data"] == prepared.fingerprint
    assert (found["training.seq_len"], found["debug.seed"]) == (32, 42)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "override",
    [
        "--training.steps=10",
        "--optimizer.lr=1e-4",
        "--training.global_batch_size=4",
        "--training.local_batch_size=1",
        "--metrics.log_freq=5",
        "--job.description=another",
        "--checkpoint.enable=true",
        "--training.mixed_precision_param=bfloat16",
    ],
)
def test_a_run_goes_on_with_another_value_of_what_may_change(recipe: Path, override: str) -> None:
    _started(recipe)
    prepare_job(plan_job(recipe, [override], 1))
    prepare_job(plan_job(recipe, [override], 2))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.seq_len=64", "its run has training.seq_len = 32, this one 64, which"),
        ("--debug.seed=43", "its run has debug.seed = 42, this one 43, which"),
        ("--model.flavor=tied", "its run has model.tied = False, this one True, which"),
        ("--data.validation_fraction=0.5", "its run has data = "),
    ],
)
def test_a_run_folder_continues_no_other_run(recipe: Path, override: str, message: str) -> None:
    plan = _started(recipe)
    with pytest.raises(UserError) as raised:
        prepare_job(plan_job(recipe, [override], 1))
    said = str(raised.value)
    assert said.startswith(f"{plan.folder}: {message}")
    assert said.endswith("which may not change on a resume; choose another job.dump_folder or set it back")


def test_another_corpus_is_another_run(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    plan = _started(recipe)
    tokenizer = prepare_job(plan).tokenizer_path
    one = corpus / "document-000.txt"
    with pytest.raises(UserError, match=r"its run has data = [0-9a-f]{64}, this one [0-9a-f]{64}, which may not"):
        prepare_job(
            plan_job(
                recipe,
                [f"--training.dataset_path={one}", f"--model.tokenizer_path={tokenizer}"],
                1,
            )
        )


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '"identity"', '{"identity"'])
def test_a_config_json_of_someone_else_is_named(recipe: Path, text: str) -> None:
    plan = plan_job(recipe, [], 1)
    plan.folder.mkdir()
    (plan.folder / "config.json").write_text(text)
    with pytest.raises(UserError) as raised:
        prepare_job(plan)
    assert str(raised.value) == (
        f"{plan.folder / 'config.json'}: is not a config.json of ours; choose another job.dump_folder or remove it"
    )
    assert (plan.folder / "config.json").read_text() == text


def test_checkpoints_of_an_unknown_run_are_not_continued(recipe: Path) -> None:
    plan = plan_job(recipe, ["--checkpoint.enable=true"], 1)
    _checkpoint(plan, 5)
    with pytest.raises(UserError) as raised:
        prepare_job(plan)
    assert str(raised.value) == f"{plan.folder}: holds checkpoints but no config.json; choose another job.dump_folder"


def test_checkpoints_are_not_passed_over_by_a_run_that_does_not_resume(recipe: Path) -> None:
    plan = plan_job(recipe, [], 1)
    _checkpoint(plan, 5)
    with pytest.raises(
        UserError, match=r"holds checkpoints up to step 5, and checkpoint\.enable = false would start over"
    ):
        prepare_job(plan)


def test_a_run_is_finished_when_a_checkpoint_is_at_its_last_step(recipe: Path) -> None:
    plan = plan_job(recipe, ["--checkpoint.enable=true"], 1)
    assert finished_step(plan) is None
    _checkpoint(plan, 19)
    assert finished_step(plan) is None
    _checkpoint(plan, 20)
    assert finished_step(plan) == 20
    _checkpoint(plan, 30)
    assert finished_step(plan) == 30
    assert (
        finished_step(
            plan_job(recipe, ["--checkpoint.enable=true", "--training.steps=31", "--lr_scheduler.total_steps=-1"], 1)
        )
        is None
    )


def test_without_checkpoints_a_run_is_never_finished(recipe: Path) -> None:
    plan = plan_job(recipe, ["--checkpoint.enable=false"], 1)
    _checkpoint(plan, 20)
    assert finished_step(plan) is None


def test_checkpoints_are_looked_for_in_the_folder_that_the_recipe_names(recipe: Path) -> None:
    _checkpoint(plan_job(recipe, ["--checkpoint.enable=true", "--checkpoint.folder=saved"], 1), 20)
    assert finished_step(plan_job(recipe, ["--checkpoint.enable=true"], 1)) is None
    assert finished_step(plan_job(recipe, ["--checkpoint.enable=true", "--checkpoint.folder=saved"], 1)) == 20


def test_a_step_to_go_back_to_has_a_checkpoint(recipe: Path) -> None:
    plan = plan_job(recipe, ["--checkpoint.enable=true", "--checkpoint.load_step=7"], 1)
    for step in (5, 10):
        _checkpoint(plan, step)
    with pytest.raises(UserError, match=r"checkpoint\.load_step = 7: .* has no such checkpoint; there are: 5, 10$"):
        prepare_job(plan)


def test_what_a_run_starts_from_exists(recipe: Path, tmp_path: Path) -> None:
    plan = plan_job(recipe, [f"--checkpoint.initial_load_path={tmp_path / 'nowhere'}"], 1)
    with pytest.raises(UserError, match='nowhere": is neither a checkpoint nor a folder of some'):
        prepare_job(plan)


def test_a_run_folder_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    message = rf"process {os.getpid()} is running in it"
    with run_folder_held(tmp_path), pytest.raises(UserError, match=message), run_folder_held(tmp_path):
        pass
    with run_folder_held(tmp_path):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_folder_in_the_place_of_a_file_is_named(recipe: Path, name: str) -> None:
    plan = plan_job(recipe, [], 1)
    (plan.folder / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}: is not a file"):
        prepare_job(plan)


@pytest.mark.parametrize("name", ["checkpoint", "tb"])
def test_a_file_in_the_place_of_a_folder_is_named(recipe: Path, name: str) -> None:
    plan = plan_job(recipe, [], 1)
    plan.folder.mkdir(parents=True)
    (plan.folder / name).write_text("in the way")
    with pytest.raises(UserError, match=f"{name}: is not a folder"):
        prepare_job(plan)


def test_a_setting_that_was_a_table_and_is_none_is_a_change(recipe: Path) -> None:
    plan = plan_job(recipe, [], 1)
    before = identity(plan, prepare_job(plan))
    before["model"]["rope_scaling"] = {"factor": 8.0}
    (plan.folder / "config.json").write_text(json.dumps({"identity": before}))
    with pytest.raises(UserError, match=r"its run has model\.rope_scaling"):
        prepare_job(plan)


def _mixture(recipe: Path, tmp_path: Path, weights: str = "[3, 1]", swapped: bool = False) -> list[str]:
    """Overrides for a mixture of the recipe's corpus and another one, under the tokenizer of the first."""
    prepared = prepare_job(plan_job(recipe, [f"--job.dump_folder={tmp_path / 'first'}"], 1))
    other = tmp_path / "other"
    other.mkdir(exist_ok=True)
    if not any(other.iterdir()):
        write_corpus(other, documents=12, sentences=30)
    paths = [str(plan_job(recipe, [], 1).config.training.dataset_path), str(other)]
    return [
        *("--training.dataset=mixture", "--training.dataset_path="),
        f"--data.mixture_paths={json.dumps(paths[::-1] if swapped else paths)}",
        f"--data.mixture_weights={weights}",
        f"--model.tokenizer_path={prepared.tokenizer_path}",
    ]


def test_a_mixture_shares_the_caches_of_its_sources(recipe: Path, tmp_path: Path) -> None:
    alone = prepare_job(plan_job(recipe, [], 1))
    mixed = prepare_job(plan_job(recipe, _mixture(recipe, tmp_path), 1))
    assert mixed.sources[0].folder == alone.sources[0].folder
    assert mixed.sources[1].folder != alone.sources[0].folder
    assert mixed.weights == (3, 1)
    assert mixed.tokens() == tuple(
        sum(tokens) for tokens in zip(*((s.train.tokens, s.validation.tokens) for s in mixed.sources), strict=True)
    )
    assert len({mixed.fingerprint, *(source.fingerprint for source in mixed.sources)}) == 3
    assert identity(plan_job(recipe, [], 1), alone)["data.mixture_weights"] is None


def test_another_mixture_is_another_run(recipe: Path, tmp_path: Path) -> None:
    _started(recipe, *(same := _mixture(recipe, tmp_path)))
    prepare_job(plan_job(recipe, same, 2))
    with pytest.raises(
        UserError, match=r"its run has data\.mixture_weights = \[3, 1\], this one \[1, 3\], which may not"
    ):
        prepare_job(plan_job(recipe, _mixture(recipe, tmp_path, "[1, 3]"), 1))
    for changed in (_mixture(recipe, tmp_path, "[1, 3]", swapped=True), []):
        with pytest.raises(UserError, match=r"its run has data = [0-9a-f]{64}, this one [0-9a-f]{64}, which may not"):
            prepare_job(plan_job(recipe, changed, 1))


def test_a_source_without_a_whole_sample_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    only = tmp_path / "other" / "few.txt"
    only.write_text("The river follows.")
    overrides = _mixture(recipe, tmp_path)
    training_part = r"^training\.seq_len = 32: the training part of data\.mixture_paths\[1\] has "
    with pytest.raises(UserError, match=training_part + r"\d+ tokens and a sample needs 33; use more text"):
        prepare_job(plan_job(recipe, overrides, 1))
    only.write_text("The river follows. " * 100)
    prepare_job(plan_job(recipe, overrides, 1))
    # Half of all names hash low enough to be held out, and this one does not.
    validating = [*overrides, "--validation.enable=true", "--data.validation_fraction=0.5"]
    held_out_part = r"^validation\.enable = true: the held-out part of data\.mixture_paths\[1\] has 0 documents with 0"
    with pytest.raises(UserError, match=held_out_part):
        prepare_job(plan_job(recipe, validating, 1))
    only.rename(only.with_name("small.txt"))  # and this one does
    with pytest.raises(UserError, match=training_part + r"0 tokens and a sample needs 33; all its documents are held"):
        prepare_job(plan_job(recipe, validating, 1))


@pytest.mark.parametrize(
    "setting",
    ['--model.converters=["quantize.linear.float8"]', '--optimizer.state_dtype="int8"'],
    ids=["float8", "int8"],
)
def test_what_needs_torchao_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr("torchtitan_lite.preflight.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs torchao, .* pip install "torchtitan-lite\[torchao\]"'):
        prepare_job(plan_job(recipe, [setting], 1))


def test_what_needs_a_compiler_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(UserError, match=r'needs a C\+\+ compiler, and there is no no-such-compiler .*"aot_eager"'):
        prepare_job(plan_job(recipe, ["--compile.enable=true"], 1))
    prepare_job(plan_job(recipe, ["--compile.enable=true", "--compile.backend=aot_eager"], 1))
    monkeypatch.setattr("torchtitan_lite.preflight.accelerators", lambda: 1)
    monkeypatch.setattr("torchtitan_lite.preflight.find_spec", lambda name: None if name == "triton" else name)
    with pytest.raises(UserError, match=r"needs triton, which is not installed"):
        prepare_job(plan_job(recipe, ["--compile.enable=true"], 1))


def test_what_needs_tensorboard_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan_lite.preflight.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"enable_tensorboard = true needs tensorboard, .* pip install tensorboard"):
        prepare_job(plan_job(recipe, ["--metrics.enable_tensorboard=true"], 1))
    prepare_job(plan_job(recipe, ["--metrics.enable_tensorboard=false"], 1))


def test_a_plan_knows_what_the_recipe_extends_and_left_open(recipe: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.toml"
    top.write_text(f'extends = "{recipe.name}"\n[training]\nglobal_batch_size = -1\n[lr_scheduler]\ntotal_steps = 90\n')
    plan = plan_job(top, [f"--job.dump_folder={tmp_path}/./run"], 2)
    assert plan.origin.chain == (str(top), str(recipe))
    assert set(plan.filled) == {"training.global_batch_size", "parallelism.data_parallel_shard_degree"}
    plan.folder.mkdir()
    write_config_json(plan, {}, "CPU")
    record = json.loads((plan.folder / "config.json").read_text())
    assert (record["extends"], record["filled"]) == ([str(recipe)], list(plan.filled))
    assert "job.dump_folder" in plan_job(top, ["--job.dump_folder="], 2).filled


@pytest.mark.parametrize("extends", [True, False])
def test_the_start_names_what_the_recipe_extends_once(
    extends: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(plan: JobPlan) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(train, "prepare_job", stop)
    top = tmp_path / "top.toml"
    top.write_text(f'extends = "{recipe.name}"\n')
    with caplog.at_level("INFO", "torchtitan_lite"), pytest.raises(UserError, match="far enough"):
        train.run(plan_job(top if extends else recipe, (), 1), 0)
    named = [line for line in caplog.messages if line.startswith("recipe ")]
    assert named == ([f"recipe    {top}, extends {recipe}"] if extends else [])
    assert caplog.messages[len(named)].startswith("model ")
