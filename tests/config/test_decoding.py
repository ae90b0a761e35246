"""Values take the type that their field declares, or say which one that is."""

from typing import Any, Literal

import pytest

from torchtitan_lite.config.decoding import check_bounds, decode, describe, nearest
from torchtitan_lite.errors import UserError

Colour = Literal["red", "green", "blue"]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        ("x", str, "x"),
        (False, bool, False),
        ("red", Colour, "red"),
        (2, Literal[1, 2], 2),
        ([], list[int], []),
        ([1, 2], list[float], [1.0, 2.0]),
        ([["a"], []], list[list[str]], [["a"], []]),
    ],
)
def test_a_value_that_fits_is_taken(value: Any, annotation: Any, expected: Any) -> None:
    decoded = decode(value, annotation, "key")
    assert decoded == expected
    assert type(decoded) is type(expected)
    if isinstance(expected, list) and expected:
        assert type(decoded[0]) is type(expected[0])


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (True, int, r"^key = true: expected an integer, got a boolean$"),
        (False, float, r"^key = false: expected a number, got a boolean$"),
        (1, bool, r"^key = 1: expected true or false, got an integer$"),
        (1.0, int, r"^key = 1\.0: expected an integer, got a number$"),
        ("1", int, r'^key = "1": expected an integer, got a string$'),
        (1, str, r"^key = 1: expected a string, got an integer$"),
        ("raed", Colour, r'^key = "raed": expected one of "red", "green", "blue"; did you mean red\?$'),
        ("zzz", Colour, r'^key = "zzz": expected one of "red", "green", "blue"$'),
        (1, Colour, r'^key = 1: expected one of "red", "green", "blue"$'),
        (True, Literal[1, 2], r'^key = true: expected one of "1", "2"$'),
        (1.0, Literal[1, 2], r'^key = 1\.0: expected one of "1", "2"$'),
        ("a", list[str], r'^key = "a": expected a list, each item a string, got a string$'),
        ({"a": 1}, list[int], r'^key = \{"a": 1\}: expected a list, each item an integer, got a table$'),
        ([1, "2"], list[int], r'^key\[1\] = "2": expected an integer, got a string$'),
        ([1, True], list[int], r"^key\[1\] = true: expected an integer, got a boolean$"),
        ([[1], [2, "3"]], list[list[int]], r'^key\[1\]\[1\] = "3": expected an integer, got a string$'),
        (["red", "gren"], list[Colour], r'^key\[1\] = "gren": expected one of .*; did you mean green\?$'),
    ],
)
def test_a_value_that_does_not_fit_is_named(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(value, annotation, "key")


def test_a_list_is_copied() -> None:
    items = ["a"]
    assert decode(items, list[str], "key") is not items


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (Colour, 'one of "red", "green", "blue"'),
        (list[str], "a list, each item a string"),
    ],
)
def test_an_annotation_is_described_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


def test_nearest_names_the_closest_or_nothing() -> None:
    assert nearest("steps", ["step", "loss"]) == "; did you mean step?"
    assert nearest("steps", ["loss", "rank"]) == ""
    assert nearest("steps", []) == ""


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"minimum": 1}),
        (10**30, {"minimum": 1}),
        (0.5, {"minimum": 0.0, "maximum": 0.5}),
        (1e-300, {"above": 0.0}),
        (float("inf"), {"above": 0.0, "infinite": True}),
        (-1, {"minimum": 1, "auto": -1}),
        (-1.0, {"minimum": 0.0, "maximum": 1.0, "auto": -1}),
        ("text", {"minimum": 1}),
        (False, {"minimum": 1}),
        (7, {}),
    ],
)
def test_a_number_within_its_bounds_passes(value: Any, bounds: dict[str, float]) -> None:
    check_bounds(value, bounds, "key")


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"minimum": 1}, "key = 0: must be at least 1"),
        (0.0, {"above": 0.0}, "key = 0.0: must be more than 0"),
        (0.51, {"maximum": 0.5}, "key = 0.51: must be at most 0.5"),
        (float("inf"), {"maximum": 1.0}, "key = inf: expected a finite number"),
        (float("-inf"), {"infinite": True}, "key = -inf: expected a finite number"),
        (0, {"minimum": 1, "auto": -1}, "key = 0: must be at least 1, or -1"),
        (-2, {"minimum": 1, "auto": -1}, "key = -2: must be at least 1, or -1"),
        (2.0, {"maximum": 1.0, "auto": -1}, "key = 2.0: must be at most 1.0, or -1"),
        (float("nan"), {}, "key = nan: expected a finite number"),
        (float("nan"), {"above": 0.0, "auto": -1}, "key = nan: expected a finite number"),
    ],
)
def test_a_number_outside_its_bounds_is_named(value: float, bounds: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as raised:
        check_bounds(value, bounds, "key")
    assert str(raised.value) == message
