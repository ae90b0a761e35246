"""JSON without Infinity and NaN."""

import json

from torchtitan_lite.strict_json import strict_dumps


def test_floats_that_are_not_finite_are_strings_that_float_reads() -> None:
    text = strict_dumps({"a": [float("inf"), 1.5], "b": {"c": float("nan")}, "d": (float("-inf"), True, None)})
    found = json.loads(text, parse_constant=lambda name: 1 / 0)
    assert found == {"a": ["inf", 1.5], "b": {"c": "nan"}, "d": ["-inf", True, None]}
    assert float(found["a"][0]) == float("inf")
