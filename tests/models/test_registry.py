"""A recipe's [model] finds its family and size, or an answer with those there are."""

from pathlib import Path

import pytest

from torchtitan_lite.config.schema import Model
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.models.llama3.args import FLAVORS
from torchtitan_lite.models.registry import find_model
from torchtitan_lite.models.spec import ModelSpec

OUTSIDE = """
from torchtitan_lite.models.spec import ModelSpec

MINE = ModelSpec("mine", {"small": "the arguments"}, None, None, None)
NUMBER = 3
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a family of its own."""
    package = tmp_path / "outside_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "family.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "outside_models.family"


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_family_and_a_size_are_found_by_name(flavor: str) -> None:
    spec, args = find_model(Model(name="llama3", flavor=flavor))
    assert spec is SPEC
    assert args == FLAVORS[flavor]


def test_the_default_model_is_there() -> None:
    spec, args = find_model(Model())
    assert spec.name == "llama3"
    assert args == FLAVORS["debugmodel"]


def test_a_family_from_outside_is_imported(outside: str) -> None:
    spec, args = find_model(Model(spec=f"{outside}:MINE", flavor="small"))
    assert isinstance(spec, ModelSpec)
    assert (spec.name, args) == ("mine", "the arguments")


def test_the_path_of_an_own_family_works_too() -> None:
    assert find_model(Model(spec="torchtitan_lite.models.llama3:SPEC", flavor="8B")) == (SPEC, FLAVORS["8B"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="lama3"), r'^model\.name = "lama3": there are llama3.*; did you mean llama3\?$'),
        (Model(name="gpt"), r'^model\.name = "gpt": there are llama3'),
        (Model(flavor="8b"), r'^model\.flavor = "8b": llama3 has debugmodel, 1B, 3B, 8B, 70B, 405B'),
        (Model(flavor="debug_model"), r'^model\.flavor = "debug_model": .*; did you mean debugmodel\?$'),
        (Model(spec="no_colon"), r'^model\.spec = "no_colon": expected package\.module:SPEC$'),
        (Model(spec=":SPEC"), r'^model\.spec = ":SPEC": expected package\.module:SPEC$'),
        (Model(spec="module:"), r'^model\.spec = "module:": expected package\.module:SPEC$'),
        (
            Model(spec="no_such_package.family:SPEC"),
            r"No module named 'no_such_package'; is its folder on PYTHONPATH\?$",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_there_is(model: Model, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_model(model)


@pytest.mark.parametrize(
    ("path", "flavor", "message"),
    [
        (":THEIRS", "small", "module outside_models.family has no THEIRS"),
        (":NUMBER", "small", "is a int, expected a torchtitan_lite.models.spec.ModelSpec"),
        ("_tree:MINE", "small", "No module named 'outside_models.family_tree'; is its folder on PYTHONPATH?"),
        (":MINE", "large", 'model.flavor = "large": mine has small'),
    ],
)
def test_a_mistake_in_a_family_from_outside_is_named(outside: str, path: str, flavor: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        find_model(Model(spec=f"{outside}{path}", flavor=flavor))
    assert message in str(raised.value)
