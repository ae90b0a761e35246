from dataclasses import asdict, replace

from torchtitan_lite.config.difference import config_difference
from torchtitan_lite.config.schema import JobConfig
from torchtitan_lite.config.techniques import Float8, LinearLayers, Quantize


def test_equal_configs_differ_in_nothing():
    assert config_difference(asdict(JobConfig()), asdict(JobConfig())) == {}


def test_keys_are_grouped_by_section_with_both_values():
    ours = JobConfig()
    theirs = replace(
        ours,
        training=replace(ours.training, steps=7),
        quantize=Quantize(linear=LinearLayers(float8=Float8(emulate=True, filter_fqns=["output"]))),
    )
    assert config_difference(asdict(ours), asdict(theirs)) == {
        "training": {"steps": (10_000, 7)},
        "quantize.linear.float8": {"filter_fqns": ([], ["output"]), "emulate": (False, True)},
    }


def test_a_key_that_one_side_lacks_is_none_there():
    a = {"training": {"steps": 1, "seq_len": 8}, "old": {"key": 0}}
    b = {"training": {"steps": 1}, "new": {"key": True}}
    assert config_difference(a, b) == {
        "training": {"seq_len": (8, None)},
        "old": {"key": (0, None)},
        "new": {"key": (None, True)},
    }
