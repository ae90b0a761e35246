"""Recipes and overrides become a JobConfig, or one line that names file, key and mend."""

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from torchtitan_lite.config import JobConfig, load_config, run_folder
from torchtitan_lite.config.loading import leaf_names, split_override
from torchtitan_lite.config.techniques import Float8, GroupedFloat8, Quantize
from torchtitan_lite.errors import UserError


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return _write(tmp_path / "empty.toml", "")


def test_an_empty_recipe_gives_the_defaults(empty: Path) -> None:
    assert load_config(empty) == JobConfig()


def test_later_wins_from_defaults_over_extends_and_recipe_to_overrides(tmp_path: Path) -> None:
    _write(tmp_path / "root.toml", "[training]\nsteps = 1\nseq_len = 1\ngc_freq = 1\nlocal_batch_size = 1\n")
    _write(
        tmp_path / "base.toml",
        'extends = "root.toml"\n[training]\nseq_len = 2\ngc_freq = 2\nlocal_batch_size = 2\n',
    )
    recipe = _write(tmp_path / "recipe.toml", 'extends = "base.toml"\n[training]\ngc_freq = 3\nlocal_batch_size = 3\n')
    training = load_config(recipe, ["--training.local_batch_size=4"]).training
    assert (training.steps, training.seq_len, training.gc_freq, training.local_batch_size) == (1, 2, 3, 4)
    assert training.max_norm == JobConfig().training.max_norm


def test_a_recipe_changes_only_the_keys_that_it_names(empty: Path) -> None:
    recipe = _write(empty.with_name("recipe.toml"), "[optimizer]\nbeta2 = 0.99\n[debug]\nseed = 7\n")
    config, defaults = load_config(recipe), JobConfig()
    assert (config.optimizer.beta2, config.debug.seed) == (0.99, 7)
    assert config.optimizer.beta1 == defaults.optimizer.beta1
    assert config.training == defaults.training


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "common" / "base.toml", "[training]\nsteps = 7\n")
    _write(tmp_path / "family" / "middle.toml", 'extends = "../common/base.toml"\n')
    recipe = _write(tmp_path / "family" / "sizes" / "recipe.toml", 'extends = "../middle.toml"\n')
    monkeypatch.chdir(tmp_path / "common")
    assert load_config(recipe).training.steps == 7


@pytest.mark.parametrize("through", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path, through: list[str]) -> None:
    for name, parent in zip(through, [*through[1:], through[0]], strict=True):
        _write(tmp_path / f"{name}.toml", f'extends = "{parent}.toml"\n')
    with pytest.raises(UserError, match=r"a\.toml: extends itself through .*a\.toml; break the circle"):
        load_config(tmp_path / "a.toml")


def test_a_circle_under_two_names_of_one_file_is_found(tmp_path: Path) -> None:
    _write(tmp_path / "a.toml", 'extends = "sub/../a.toml"\n')
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="extends itself"):
        load_config(tmp_path / "a.toml")


def test_a_missing_base_names_both_files(tmp_path: Path) -> None:
    recipe = _write(tmp_path / "recipe.toml", 'extends = "bsae.toml"\n')
    _write(tmp_path / "base.toml", "")
    with pytest.raises(
        UserError,
        match=r"bsae\.toml \(extended by .*recipe\.toml\): no such recipe; did you mean base\.toml\?",
    ):
        load_config(recipe)


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    _write(tmp_path / "base.toml", "[training]\nsteps = 'ten'\n")
    recipe = _write(tmp_path / "recipe.toml", 'extends = "base.toml"\n')
    with pytest.raises(UserError, match=r'base\.toml: training\.steps = "ten": expected an integer, got a string'):
        load_config(recipe)


def test_a_missing_recipe_names_its_nearest_neighbour(tmp_path: Path) -> None:
    _write(tmp_path / "llama3_debug.toml", "")
    with pytest.raises(UserError, match=r"llama3_debgu\.toml: no such recipe; did you mean llama3_debug\.toml\?"):
        load_config(tmp_path / "llama3_debgu.toml")
    with pytest.raises(UserError, match=r"recipe\.toml: no such recipe$"):
        load_config(tmp_path / "no" / "folder" / "recipe.toml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: cannot be read: ")):
        load_config(tmp_path)


def test_bytes_that_are_no_text_are_no_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(b"[job]\ndescription = '\xff'\n")
    with pytest.raises(UserError, match=r"recipe\.toml: is not UTF-8 text"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # TOML itself
        ("[training]\nsteps = 5\nsteps =\n", r"recipe\.toml: not valid TOML: .*line 3"),
        ("[training\n", r"recipe\.toml: not valid TOML: .*line 1"),
        ("[training]\nsteps = 1\nsteps = 2\n", r"recipe\.toml: not valid TOML: .*line 3"),
        ("extends = 3\n", r'recipe\.toml: extends = 3: expected the path of one recipe, as in extends = "base\.toml"'),
        ('extends = ["a.toml"]\n', r"recipe\.toml: extends = .*: expected the path of one recipe"),
        # keys and sections
        ("[training]\nstpes = 5\n", r"recipe\.toml: unknown key training\.stpes; did you mean training\.steps\?"),
        ("[optimiser]\nlr = 1.0\n", r"recipe\.toml: unknown section or key optimiser; did you mean optimizer"),
        ("[metrics]\nlog_frequ = 5\n", r"unknown key metrics\.log_frequ; did you mean metrics\.log_freq\?"),
        ("[job]\nqqqqqqqqqq = 5\n", r"recipe\.toml: unknown key job\.qqqqqqqqqq; there are: dump_folder, description$"),
        ("zzzzzz = 5\n", r"recipe\.toml: unknown section or key zzzzzz; there are: job, model, training, .*debug$"),
        (
            "[fault_tolerance]\nenable = true\n",
            r"recipe\.toml: section \[fault_tolerance\] is TorchTitan's; remove it, or try",
        ),
        (
            "[parallelism]\npipeline_parallel_last_stage_less_layers = 1\n",
            r"TorchTitan's; here the automatic split weighs norm and output by their FLOPs; remove it",
        ),
        (
            "[activation_checkpoint]\nearly_stop = true\n",
            r"activation_checkpoint.early_stop is TorchTitan's; here recomputation always stops when it has what",
        ),
        ("training = 5\n", r"recipe\.toml: training = 5: is a section; write \[training\] and its keys under it"),
        ("[[training]]\nsteps = 5\n", r"training = .*: is a section; write \[training\]"),
        ("[training.steps]\na = 1\n", r"recipe\.toml: training\.steps = .*: expected an integer, got a table"),
        # types
        ("[training]\nsteps = '5'\n", r'recipe\.toml: training\.steps = "5": expected an integer, got a string'),
        ("[training]\nsteps = 5.0\n", r"training\.steps = 5\.0: expected an integer, got a number"),
        ("[training]\nsteps = true\n", r"training\.steps = true: expected an integer, got a boolean"),
        ("[training]\nsteps = [5]\n", r"training\.steps = \[5\]: expected an integer, got a list"),
        ("[training]\nsteps = 2024-01-01\n", r"training\.steps = \"2024-01-01\": expected an integer, got date"),
        ("[optimizer]\nlr = false\n", r"optimizer\.lr = false: expected a number, got a boolean"),
        ("[optimizer]\nlr = '1e-3'\n", r'optimizer\.lr = "1e-3": expected a number, got a string'),
        ("[checkpoint]\nenable = 1\n", r"checkpoint\.enable = 1: expected true or false, got an integer"),
        ("[job]\ndescription = 3\n", r"job\.description = 3: expected a string, got an integer"),
        (
            "[optimizer]\nweight_decay_exclude = '*norm*'\n",
            r'optimizer\.weight_decay_exclude = "\*norm\*": expected a list, each item a string, got a string',
        ),
        (
            "[[optimizer.param_groups]]\npattern = '*'\n[[optimizer.param_groups]]\nlr_facto = 1.0\n",
            r"optimizer\.param_groups\[1\]\.lr_facto: no such key; did you mean lr_factor\?",
        ),
        (
            "[[optimizer.param_groups]]\nbeta2 = 1\n",
            r"optimizer\.param_groups\[0\]\.beta2 = 1\.0: must be less than 1, or -1",
        ),
        (
            "[optimizer]\nparam_groups = ['*.bias']\n",
            r'optimizer\.param_groups\[0\] = "\*\.bias": expected a table of pattern, .*, got a string',
        ),
        (
            "[optimizer]\nweight_decay_exclude = ['*norm*', 3]\n",
            r"optimizer\.weight_decay_exclude\[1\] = 3: expected a string, got an integer",
        ),
        (
            "[training]\nmixed_precision_param = 'bfloat61'\n",
            r'mixed_precision_param = "bfloat61": expected one of "bfloat16", "float32"; did you mean bfloat16\?',
        ),
        ("[lr_scheduler]\ndecay_type = 3\n", r'decay_type = 3: expected one of "linear", "sqrt", "cosine"$'),
        # bounds
        ("[training]\nsteps = 0\n", r"recipe\.toml: training\.steps = 0: must be at least 1$"),
        ("[training]\nglobal_batch_size = 0\n", r"training\.global_batch_size = 0: must be at least 1, or -1$"),
        ("[training]\nglobal_batch_size = -2\n", r"training\.global_batch_size = -2: must be at least 1, or -1$"),
        ("[training]\nmax_norm = 0\n", r"training\.max_norm = 0\.0: must be more than 0$"),
        ("[training]\nmax_norm = nan\n", r"training\.max_norm = nan: expected a finite number$"),
        ("[optimizer]\nbeta1 = 1.5\n", r"optimizer\.beta1 = 1\.5: must be less than 1$"),
        ("[optimizer]\nlr = -1e-3\n", r"optimizer\.lr = -0\.001: must be at least 0\.0$"),
        ("[lr_scheduler]\ndecay_ratio = 1.1\n", r"lr_scheduler\.decay_ratio = 1\.1: must be at most 1\.0, or -1$"),
        ("[lr_scheduler]\ndecay_ratio = -0.5\n", r"lr_scheduler\.decay_ratio = -0\.5: must be at least 0\.0, or -1$"),
        ("[data]\nvalidation_fraction = 0.6\n", r"data\.validation_fraction = 0\.6: must be at most 0\.5$"),
        (f"[debug]\nseed = {2**63}\n", r"debug\.seed = 9223372036854775808: must be at most 9223372036854775807$"),
        # rules across keys, which load_config applies too
        ("[training]\ndataset = 'text'\n", r'training\.dataset = "text" needs training\.dataset_path'),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    recipe = _write(tmp_path / "recipe.toml", text)
    with pytest.raises(UserError, match=message) as raised:
        load_config(recipe)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.steps", r"argument --training\.steps: no value; write --training\.steps=VALUE in one word"),
        ("training.steps=5", r"argument training\.steps=5: expected --section\.key=value, as in --training\.steps=100"),
        ("-training.steps=5", r"argument -training\.steps=5: expected --section\.key=value"),
        ("--steps=5", r"argument --steps=5: expected --section\.key=value"),
        ("--training.stpes=5", r"--training\.stpes: unknown key training\.stpes; did you mean training\.steps\?"),
        ("--trainning.steps=5", r"--trainning\.steps: unknown section or key trainning\.steps; did you mean train"),
        (
            "--training.steps.deep=5",
            r"--training\.steps\.deep: training\.steps is a key, not a section; write --training\.steps=VALUE$",
        ),
        ("--fault_tolerance.x=1", r"--fault_tolerance\.x: section \[fault_tolerance\] is TorchTitan's; remove it"),
        ("--fault_tolerance.enable=true", r"--fault_tolerance\.enable: .* is TorchTitan's; here there is no TorchFT"),
        ("--training.steps=", r'^--training\.steps = "": expected an integer, got a string$'),
        ("--training.steps=ten", r'^--training\.steps = "ten": expected an integer, got a string$'),
        ("--training.steps=1.5", r"^--training\.steps = 1\.5: expected an integer, got a number$"),
        ("--training.steps=0", r"^--training\.steps = 0: must be at least 1$"),
        ("--checkpoint.enable=True", r'^--checkpoint\.enable = "True": expected true or false, got a string$'),
        ("--checkpoint.enable=1", r"^--checkpoint\.enable = 1: expected true or false, got an integer$"),
        ("--optimizer.lr=nan", r"^--optimizer\.lr = nan: expected a finite number$"),
        ("--lr_scheduler.decay_type=cosin", r'decay_type = "cosin": expected one of .*; did you mean cosine\?$'),
        ("--optimizer.weight_decay_exclude=*.bias", r'weight_decay_exclude = "\*\.bias": expected a list'),
        ("--training.steps=1\nseq_len = 2", r"(?s)^--training\.steps = .*: expected an integer, got a string$"),
    ],
)
def test_a_mistake_in_an_override_is_named(empty: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(empty, [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("--training.steps=100", 100),
        ("--training.steps=1_000", 1000),
        ("--training.global_batch_size=-1", -1),
        ("--training.max_norm=2", 2.0),
        ("--training.max_norm=inf", float("inf")),
        ("--optimizer.lr=1e-3", 1e-3),
        ("--checkpoint.enable=true", True),
        ("--job.description=plain words = here", "plain words = here"),
        ('--job.description="quoted words"', "quoted words"),
        ("--job.description='quoted words'", "quoted words"),
        ('--job.description="', '"'),
        ("--job.description='mixed\"", "'mixed\""),
        ("--job.description=", ""),
        ("--job.description=5", "5"),
        ("--job.description=true", "true"),
        ("--lr_scheduler.decay_type=cosine", "cosine"),
        ('--lr_scheduler.decay_type="cosine"', "cosine"),
        ("--optimizer.weight_decay_exclude=[]", []),
        ('--optimizer.weight_decay_exclude=["*.bias", "*scale*"]', ["*.bias", "*scale*"]),
    ],
)
def test_an_override_is_read_as_toml_or_as_a_bare_string(empty: Path, override: str, value: object) -> None:
    section, key = override[2:].partition("=")[0].split(".")
    read = getattr(getattr(load_config(empty, [override]), section), key)
    assert read == value
    assert type(read) is type(value)


def test_the_later_override_wins(empty: Path) -> None:
    overrides = ["--training.steps=1", "--training.seq_len=8", "--training.steps=2"]
    assert load_config(empty, overrides).training.steps == 2
    assert load_config(empty, overrides[::-1]).training.steps == 1


def test_rules_hold_for_what_recipe_and_overrides_give_together(tmp_path: Path) -> None:
    recipe = _write(tmp_path / "recipe.toml", "[training]\ndataset = 'text'\n")
    assert load_config(recipe, ["--training.dataset_path=corpus"]).training.dataset_path == "corpus"


def test_an_integer_is_taken_for_a_number_as_a_float(tmp_path: Path) -> None:
    lr = load_config(_write(tmp_path / "recipe.toml", "[optimizer]\nlr = 1\n")).optimizer.lr
    assert lr == 1.0
    assert type(lr) is float


def test_bounds_are_inclusive_where_they_say_at_least_and_at_most(empty: Path) -> None:
    overrides = [
        "--training.steps=1",
        "--lr_scheduler.warmup_steps=0",
        "--optimizer.beta1=0",
        "--lr_scheduler.min_lr_factor=1.0",
        "--data.validation_fraction=0.5",
        f"--debug.seed={2**63 - 1}",
        "--lr_scheduler.decay_ratio=-1",
        "--lr_scheduler.min_lr_factor=1",
    ]
    config = load_config(empty, overrides)
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (1, 0)
    assert (config.optimizer.beta1, config.lr_scheduler.min_lr_factor) == (0.0, 1.0)
    assert (config.data.validation_fraction, config.debug.seed) == (0.5, 2**63 - 1)
    assert (config.lr_scheduler.decay_ratio, config.lr_scheduler.min_lr_factor) == (-1.0, 1.0)


def test_a_config_and_its_sections_are_frozen() -> None:
    config = JobConfig()
    for field in fields(config):
        section = getattr(config, field.name)
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, section)
        for key in fields(section):
            with pytest.raises(FrozenInstanceError):
                setattr(section, key.name, getattr(section, key.name))


def test_configs_share_no_list() -> None:
    assert JobConfig().optimizer.weight_decay_exclude is not JobConfig().optimizer.weight_decay_exclude


def test_split_override_cuts_at_the_first_equals_sign() -> None:
    assert split_override("--job.description=a=b") == ("job.description", "a=b")


def test_leaf_names_are_all_keys_with_their_sections() -> None:
    names = list(leaf_names(JobConfig))
    sections = [getattr(JobConfig(), field.name) for field in fields(JobConfig)]
    keys = sum(len(fields(section)) for section in sections if not isinstance(section, Quantize))
    assert len(names) == keys + len(fields(Float8)) + len(fields(GroupedFloat8))
    assert len(set(names)) == len(names)
    assert {"job.dump_folder", "training.steps", "quantize.linear.float8.emulate"} <= set(names)


def test_the_run_folder_is_named_or_after_the_recipe(empty: Path) -> None:
    assert run_folder(load_config(empty), "recipes/big.toml") == Path("outputs/big")
    assert run_folder(load_config(empty, ["--job.dump_folder=runs/7"]), "recipes/big.toml") == Path("runs/7")
