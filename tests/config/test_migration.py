"""Recipes of TorchTitan's dialect become ours, and no key goes without a word."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.test_titan import KEYS_OF_0_2_0, KEYS_OF_0_2_2
from torchtitan_lite.config.document import toml_value
from torchtitan_lite.config.loading import load_config, parse_toml
from torchtitan_lite.config.migration import Told, migrate
from torchtitan_lite.errors import UserError
from torchtitan_lite.migrate import check
from torchtitan_lite.strict_json import flat

EVERY = "activation_checkpoint.selective_ac_option"
EXPERTS = "parallelism.expert_parallel_degree"
CUT = "parallelism.expert_tensor_parallel_degree"
LEFT = "quantize.linear.float8.filter_fqns"
FQNS = "quantize.grouped_mm.float8.fqns"
CONVERTED = {"model.converters": ["quantize.linear.float8"]}
REFUSED = {"deepseek_v3_16b": 'model.name = "deepseek_v3"', "flux_schnell": 'model.name = "flux"'}
DIALECT = sorted((Path(__file__).parent / "titan_dialect").glob("*.toml"))


def _flat(text: str) -> dict[str, Any]:
    return flat(parse_toml(text, "text"))


def _told(text: str) -> dict[str, Told]:
    return {each.key: each for each in migrate(text, "old.toml").told}


def _new(text: str) -> dict[str, Any]:
    return _flat(migrate(text, "old.toml").text)


@pytest.mark.parametrize("old", DIALECT, ids=lambda path: path.stem)
def test_each_old_key_is_in_the_new_recipe_or_told(old: Path) -> None:
    text = old.read_text(encoding="utf-8")
    moved = migrate(text, str(old))
    new, told = _flat(moved.text), {each.key: each for each in moved.told}
    for key, value in _flat(text).items():
        assert told[key].value == value
        stays = new.get(key) == value
        assert stays or (told[key].action != "kept" and told[key].line()), key
        assert {name: new[name] for name in told[key].to} == told[key].to, key
    # Nor is anything there that was not told.
    assert new == {name: value for each in moved.told for name, value in each.to.items()}


@pytest.mark.parametrize("old", DIALECT, ids=lambda path: path.stem)
def test_the_new_recipe_passes_its_check_or_the_reason_is_told(old: Path) -> None:
    found = check(migrate(old.read_text(encoding="utf-8"), str(old)).text)
    reason = REFUSED.get(old.stem)
    if reason is not None:
        assert found["error"] == f"{reason}: there are llama3, qwen3"
    else:
        assert (found["ok"], found["error"]) == (True, None)


def test_a_mixture_keeps_its_float8_and_hears_of_no_key_without_effect() -> None:
    old = next(path for path in DIALECT if path.stem == "qwen3_30b_a3b")
    moved = migrate(old.read_text(encoding="utf-8"), str(old))
    new = _flat(moved.text)
    assert new["model.converters"] == ["quantize.linear.float8", "quantize.grouped_mm.float8"]
    assert new[FQNS] == ["experts"]
    assert new[LEFT] == ["output"], "here no router is a linear layer that could be named"
    assert not [warning for warning in check(moved.text)["warnings"] if "quantize" in warning]


def test_what_stays_keeps_its_place_its_lines_and_its_comments() -> None:
    text = "# mine\n[training]\nsteps = 10 # few\n\n# why\nseq_len = 1_024\n[debug]\nseed = 1\n"
    moved = migrate(text + "[optimizer]\nweight_decay = 0.0", "old.toml").text
    assert moved == text + "[optimizer]\nweight_decay = 0.0\n"


def test_a_changed_key_has_its_reason_above_it_and_a_dropped_one_stays_as_a_comment() -> None:
    text = '[metrics]\nenable_wandb = true # ours\n[parallelism]\ncontext_parallel_rotate_method = "alltoall"\n'
    lines = migrate(text, "old.toml").text.splitlines()
    assert lines[:3] == [
        "[metrics]",
        "# dropped: there is no Weights & Biases; metrics.jsonl and TensorBoard have the numbers",
        "# enable_wandb = true # ours",
    ]
    at = lines.index('context_parallel_rotate_method = "alltoall"')
    assert lines[at - 2].startswith("# changed: here ranks exchange sequence for heads (Ulysses)")


@pytest.mark.parametrize(
    ("text", "key", "action", "to", "warning"),
    [
        ("checkpoint.last_save_model_only = true", "", "changed", None, False),
        ("checkpoint.last_save_model_only = false", "", "kept", None, False),
        ('parallelism.context_parallel_rotate_method = "allgather"', "", "kept", None, False),
        ("validation.steps = 5", "", "changed", None, False),
        ("validation.steps = -1", "", "kept", None, False),
        ("training.seed = 3", "", "renamed", {"debug.seed": 3}, False),
        ("model.load_balance_coeff = 0.01", "", "renamed", {"moe.bias_update_rate": 0.01}, False),
        ("metrics.enable_wandb = false", "", "dropped", {}, False),
        ("metrics.enable_wandb = true", "", "dropped", {}, True),
        ("optimizer.early_step_in_backward = true", "", "dropped", {}, True),
        ('optimizer.name = "Adam"', "", "dropped", {}, True),
        ("training.steps = 0", "", "dropped", {}, True),
        ('job.dump_folder = "./outputs"', "", "dropped", {}, False),
        ('job.dump_folder = "mine"', "", "changed", None, False),
        (f"{EVERY} = 2", "", "changed", {EVERY: "2"}, False),
        ('model.flavor = "8B_varlen"', "", "changed", {"model.flavor": "8B", "data.document_mask": True}, False),
        ('model.tokenizer_path = "a.model"', "", "changed", None, True),
        ('model.tokenizer_path = "folder"', "", "dropped", {}, True),
        ('model.converters = ["mx", "quantize.linear.float8"]', "", "changed", CONVERTED, True),
        ('model.converters = ["quantize.linear.float8"]', "", "kept", None, False),
        ('model.converters = ["quantize.linear.float8", "quantize.grouped_mm.float8"]', "", "kept", None, False),
        ('quantize.grouped_mm.float8.fqns = ["experts"]', "", "kept", None, False),
        (f'{FQNS} = "layers.1.moe, experts"', "", "changed", {FQNS: ["layers.1.feed_forward", "experts"]}, False),
        (f'{LEFT} = ["output", "moe.router.gate"]', "", "changed", {LEFT: ["output"]}, False),
        (f'{LEFT} = ["moe.shared_experts"]', "", "changed", {LEFT: ["feed_forward.shared"]}, False),
        (f'{LEFT} = ["output", "moe"]', "", "changed", {LEFT: ["output"]}, False),
        (f'{LEFT} = "output, moe.router.gate"', "", "changed", {LEFT: ["output"]}, False),
        (f'{LEFT} = [1, "moe"]', "", "dropped", {}, True),
        (f'{FQNS} = ["router"]', "", "kept", None, False),
        (f'{LEFT} = ["auto_filter_small_kn"]', "", "changed", {LEFT: ["auto_filter_small"]}, False),
        (f'{LEFT} = ["output", "attention.wk"]', "", "kept", None, False),
        ('quantize.linear.mx.filter_fqns = ["output"]', "", "dropped", {}, False),
        (
            'model.converters = ["quantize.linear.mx"]\nquantize.linear.mx.recipe_name = "mxfp8_cublas"',
            "quantize.linear.mx.recipe_name",
            "dropped",
            {},
            True,
        ),
        (
            'model.converters = 5\nquantize.linear.mx.recipe_name = "mxfp8_cublas"',
            "quantize.linear.mx.recipe_name",
            "dropped",
            {},
            True,
        ),
        ("validation.seq_len = 2048", "", "dropped", {}, False),
        ("validation.seq_len = 512", "", "dropped", {}, True),
        (f"{EXPERTS} = 2", "", "kept", None, False),
        (f"{EXPERTS} = 2\nparallelism.tensor_parallel_degree = 2", EXPERTS, "changed", None, False),
        (f"{CUT} = 2", "", "changed", {CUT: 1}, False),
        ('checkpoint.exclude_from_loading = ["lr_scheduler"]', "", "dropped", {}, False),
        (
            'checkpoint.initial_load_path = "x"\ncheckpoint.initial_load_model_only = false\n'
            'checkpoint.exclude_from_loading = ["lr_scheduler", "optimizer"]',
            "checkpoint.exclude_from_loading",
            "changed",
            {"checkpoint.exclude_from_loading": ["optimizer"]},
            False,
        ),
        ("metrics.log_sample_ids = true", "", "kept", None, False),
        ("training.stpes = 1", "", "unknown", {}, True),
        ("nothing = 1", "", "unknown", {}, True),
    ],
)  # fmt: skip
def test_what_becomes_of_a_key(text: str, key: str, action: str, to: dict[str, Any] | None, warning: bool) -> None:
    key = key or text.partition(" = ")[0]
    each = _told(text)[key]
    expected = {key: _flat(text)[key]} if to is None else to
    assert (each.action, each.to, each.warning) == (action, expected, warning)
    if action not in ("kept", "renamed"):
        assert each.told
    assert all(_new(text)[name] == value for name, value in expected.items())


def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    assert "did you mean training.steps?" in _told("[training]\nstpes = 1")["training.stpes"].told
    assert "did you mean training?" in _told("[trainning]\nstpes = 1")["trainning.stpes"].told
    assert _told("[validation]\nall_timesteps = false")["validation.all_timesteps"].told == "no key of TorchTitan 0.2.2"
    assert _told("[encoder]\nclip = 'x'")["encoder.clip"].told == "no key of TorchTitan 0.2.2"
    assert "did you mean optimizer.lr?" in _told("[training]\nlr = 1")["training.lr"].told


def test_other_defaults_are_told_where_the_key_is_absent() -> None:
    told = _told("[checkpoint]\nenable = true")
    for key in ("debug.seed", "metrics.enable_tensorboard", "job.dump_folder", "checkpoint.last_save_model_only"):
        assert told[key].action == "default"
    told = _told("debug.seed = 1\nmetrics.enable_tensorboard = true\n")
    assert {each.key for each in told.values() if each.action == "default"} == {"job.dump_folder", "training.dataset"}
    assert "debug.seed" not in _told("training.seed = 1")


def test_all_parameters_decay_as_in_torchtitan() -> None:
    assert _new("[optimizer]\nlr = 1.0")["optimizer.weight_decay_exclude"] == []
    assert "optimizer.weight_decay_exclude" not in _new("[optimizer]\nweight_decay = 0.0")
    assert _new('[optimizer]\nweight_decay_exclude = ["x"]')["optimizer.weight_decay_exclude"] == ["x"]


@pytest.mark.parametrize(
    "text",
    [
        "debug.deterministic = true\ntraining.seed = 1\n",
        "debug = { deterministic = true }\ntraining.seed = 1\n",
        "[debug]\n[training]\nseed = 1\n",
        "[training]\nseed = 1\n# last",
        "[training]\r\nseed = 1\r\n[debug]\r\n",
    ],
)  # fmt: skip
def test_a_renamed_key_finds_its_section_however_that_is_written(text: str) -> None:
    assert _new(text)["debug.seed"] == 1


def test_the_key_that_is_there_already_counts() -> None:
    text = "[training]\nseed = 1\n[debug]\nseed = 2\n"
    assert _new(text)["debug.seed"] == 2
    assert _told(text)["training.seed"].told == "debug.seed is set too, and counts"


def test_a_key_that_is_renamed_onto_one_that_is_there_is_left_out_with_a_warning() -> None:
    each = _told("[training]\nseed = 1\n[debug]\nseed = 2\n")["training.seed"]
    assert (each.action, each.to, each.warning) == ("dropped", {}, True)


def test_what_a_value_becomes_does_not_write_over_the_key_that_is_there_already() -> None:
    text = '[model]\nflavor = "8B_flex_attn"\n[data]\ndocument_mask = false\n'
    assert _told(text)["model.flavor"].to == {"model.flavor": "8B"}
    new = migrate(text, "old.toml").text
    assert new.count("document_mask = ") == 1
    assert _flat(new)["data.document_mask"] is False


def test_an_inline_table_is_taken_apart_where_a_key_of_it_goes() -> None:
    new = _new("[quantize]\nlinear = { float8 = { emulate = true }, mx = { recipe_name = 'x' } }\n")
    assert new["quantize.linear.float8.emulate"] is True
    assert not any(key.startswith("quantize.linear.mx") for key in new)


def test_sections_that_are_gone_leave_no_header() -> None:
    moved = migrate("[fault_tolerance]\nenable = true\n[[encoder]]\nwidth = 1\n[encoder.inner]\n", "old.toml").text
    assert "# [fault_tolerance]" in moved.splitlines()
    assert "# [[encoder]]" in moved.splitlines()
    assert "# [encoder.inner]" in moved.splitlines()


def test_broken_toml_is_refused_with_its_line() -> None:
    with pytest.raises(UserError, match=r"old\.toml: not valid TOML: .*line 2"):
        migrate("[training]\nsteps =\n", "old.toml")


SAMPLES = [True, False, 0, 2, -1, 0.5, 2**62, "", "x", "alltoall", "8B_flex", [], ["x"], [["x"]], [1]]


def _refused(recipe: Path) -> str:
    try:
        load_config(recipe)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("section", KEYS_OF_0_2_2)
def test_any_value_of_any_key_gives_a_recipe_that_loads_as_far_as_its_keys_go(section: str, tmp_path: Path) -> None:
    names = (KEYS_OF_0_2_2[section] + " " + KEYS_OF_0_2_0.get(section, "")).split()
    for name in names:
        for value in SAMPLES:
            text = f"[{section}]\n{name} = {toml_value(value)}\n"
            moved = migrate(text, "old.toml")
            assert moved.told[0].key == f"{section}.{name}"
            path = tmp_path / "new.toml"
            path.write_text(moved.text)
            refused = _refused(path)  # by a rule across keys, for every key by itself is taken
            assert not refused.startswith(f"{path}: "), text
