"""Which peaks a run is held against, and what share of its FLOPs is in float8."""

from pathlib import Path

import pytest

from torchtitan_lite.models.llama3 import SPEC
from torchtitan_lite.preflight import JobPlan, plan_job
from torchtitan_lite.rates import _peaks, float8_flops

RECIPE = Path(__file__).parents[1] / "train_configs" / "llama3_debug.toml"
F8 = "--quantize.linear.float8."
H100 = "NVIDIA H100 80GB HBM3"


def _plan(*overrides: str) -> JobPlan:
    return plan_job(RECIPE, ['--model.converters=["quantize.linear.float8"]', *overrides], 1)


@pytest.mark.parametrize(
    ("overrides", "each"),
    [
        ((), 6),
        ((f"{F8}recipe_name=rowwise",), 6),
        ((f"{F8}recipe_name=rowwise_with_gw_hp",), 4),  # gradients of weights are not in float8
        ((f"{F8}emulate=true",), 0),
        (("--model.converters=[]",), 0),
    ],
)
def test_flops_in_float8_are_those_of_the_layers_that_are_converted(overrides: tuple[str, ...], each: int) -> None:
    args = SPEC.flavors["debugmodel"]
    layer = 4 * args.dim * args.dim + 3 * args.dim * args.ffn_dim
    output = args.dim * args.vocab_size
    assert float8_flops(_plan(*overrides)) == each * (args.n_layers * layer + output)
    if each == 6:
        assert float8_flops(_plan(f'{F8}filter_fqns=["output"]', *overrides)) == each * args.n_layers * layer
        # An output matrix that is one with the loss stays as it is.
        assert float8_flops(_plan("--training.loss_chunks=8", *overrides)) == each * args.n_layers * layer


@pytest.mark.parametrize(
    ("device", "precision", "share", "peaks", "told"),
    [
        (H100, "bfloat16", 0.0, {"mfu": 989.0}, f"mfu is over 989 TFLOP/s, {H100} in bfloat16"),
        (H100, "bfloat16", 1.0, {"mfu": 989.0, "mfu_float8": 1979.0}, "mfu_float8 over 1,979 TFLOP/s, with 100.0% of"),
        (H100, "float32", 0.0, {"mfu": None}, "this run is in float32: no MFU"),
        (H100, "float32", 0.5, {"mfu": None, "mfu_float8": None}, "mfu_float8 over unknown"),
        ("NVIDIA A100", "bfloat16", 0.5, {"mfu": 312.0, "mfu_float8": None}, "mfu_float8 over unknown"),
        ("CPU", "bfloat16", 0.0, {"mfu": None}, "unknown for CPU: no MFU"),
    ],
)
def test_a_run_is_held_against_peaks_of_its_precision_and_says_so(
    device: str, precision: str, share: float, peaks: dict[str, float | None], told: str
) -> None:
    found, said = _peaks(device, precision, share)
    assert found == pytest.approx(peaks)
    assert told in said
