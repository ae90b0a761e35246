"""The schema documents itself: docs/configuration.md, and `config show` as a recipe that can be read again."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

from torchtitan_lite.config import JobConfig, load_config
from torchtitan_lite.config.document import config_lines, field_docs, markdown
from torchtitan_lite.config.loading import leaf_names

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_document_is_what_the_schema_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), "out of date: run `make docs`"


def test_every_field_of_every_section_has_a_docstring() -> None:
    sections = [field.type for field in fields(JobConfig)]
    while sections:
        section = sections.pop()
        assert isinstance(section, type)
        assert section.__doc__
        assert not section.__doc__.startswith(f"{section.__name__}("), "the one that dataclass makes up"
        for field in fields(section):
            sections += [item for item in get_args(field.type) if is_dataclass(item)]
            if is_dataclass(field.type):
                sections.append(field.type)
            else:
                assert field_docs().get((section.__name__, field.name)), f"{section.__name__}.{field.name}"


def test_every_field_has_one_row_under_its_section() -> None:
    rows, section = [], ""
    for line in markdown().splitlines():
        if line.startswith("## "):
            section = line[4:-1]
        elif section.startswith("["):
            continue  # keys of a list's tables
        elif line.startswith("| `"):
            rows.append(f"{section}.{line.split('`')[1]}")
            # Bars within a cell are escaped, so that a row keeps its four columns.
            assert line.replace("\\|", "").count("|") == 5, line
    assert rows == list(leaf_names(JobConfig))


def test_a_row_names_type_bounds_default_and_meaning() -> None:
    lines = markdown().splitlines()
    assert (
        "| `global_batch_size` | an integer, at least 1, or -1 | `-1` | "
        "Samples of one step over all ranks. -1: local_batch_size x data-parallel ranks. More than the ranks hold at "
        "once is reached by gradient accumulation; a rank count that does not divide it is legal. |"
    ) in lines
    assert any(line.startswith("| `max_norm` | a number, more than 0 | `1.0` | ") for line in lines)
    assert any(line.startswith('| `name` | one of "AdamW", "Muon" | `"AdamW"` | ') for line in lines)
    assert any(line.startswith("| `enable` | true or false | `false` | ") for line in lines)
    assert any(
        line.startswith('| `weight_decay_exclude` | a list, each item a string | `["*norm*", "*.bias"]` | ')
        for line in lines
    )


def test_config_lines_can_be_read_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("")
    overrides = [
        "--optimizer.lr=3e-5",
        "--optimizer.eps=1e-8",
        "--training.max_norm=inf",
        "--checkpoint.enable=true",
        "--optimizer.weight_decay_exclude=[]",
        "--job.description=with # a hash",
        "--quantize.linear.float8.filter_fqns=['output']",
        '--optimizer.param_groups=[{pattern="*.bias", lr_factor=2}, {pattern="output.*", weight_decay=0.0}]',
    ]
    config = load_config(first, overrides)
    second.write_text("\n".join(config_lines(config)))
    assert load_config(second) == config


def test_config_lines_mark_what_is_not_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[training]\nsteps = 5\n[checkpoint]\nfolder = 'saved'\n")
    lines = config_lines(load_config(recipe))
    assert "steps = 5  # default 10000" in lines
    assert 'folder = "saved"  # default "checkpoint"' in lines
    assert [line for line in lines if "#" in line] == [line for line in lines if "5  #" in line or "saved" in line]
    headings = [field.name for field in fields(JobConfig)]
    at = headings.index("quantize")
    headings[at : at + 1] = ["quantize.linear.float8", "quantize.grouped_mm.float8"]
    assert [line for line in lines if line.startswith("[")] == [f"[{heading}]" for heading in headings]
