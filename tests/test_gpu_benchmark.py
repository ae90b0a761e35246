"""benchmarks/gpu.py, as far as it can go wrong without a GPU: what fits, how cases end, what targets say."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_cases import CASES, LLAMA, MIXTURE, layers_that_fit

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(("gib", "layers"), [(24, (0, 0)), (79, (8, 4)), (139, (20, 9)), (2000, (32, 48))])
def test_as_many_layers_as_fit(gib: int, layers: tuple[int, int]) -> None:
    models = (LLAMA.flavors["32"], MIXTURE.flavors["48"])
    assert tuple(layers_that_fit(args, 8192, gib * 2**30) for args in models) == layers


@pytest.mark.parametrize(
    ("program", "state", "words"),
    [
        ("print('well')", "ok", "well"),
        ("raise MemoryError('CUDA out of memory. Tried to allocate')", "out of memory", "Error: CUDA out of memory"),
        ("print('ValueError: odd\\nerror: rank 0 failed first'); exit(1)", "failed", "ValueError: odd"),
        ("import time; print('begun', flush=True); time.sleep(60)", "out of time", "begun"),
    ],
)
def test_a_case_that_does_not_end_well_says_how(program: str, state: str, words: str) -> None:
    found, text = gpu.ended([sys.executable, "-c", program], dict(os.environ), 1.0 if state == "out of time" else 60.0)
    assert found == state
    assert words in gpu.last_words(text)


def test_float8_may_take_the_better_of_the_losses_as_bfloat16_may() -> None:
    names = {case.name for case in CASES}
    for name in ("compile", "float8 tensorwise", "float8 rowwise"):
        assert {name, f"{name}, chunked loss"} <= names


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [
        {"case": "compile", "state": "ok", "tps": 100.0, "mfu": 0.49},
        {"case": "compile, chunked loss", "state": "out of memory"},
        {"case": "float8 tensorwise", "state": "ok", "tps": 120.0, "mfu": 0.6},
        {"case": "float8 rowwise, chunked loss", "state": "ok", "tps": 130.0, "mfu": 0.6},
    ]
    on_h100 = {aim["target"][:7]: aim["measured"] for aim in gpu.targets(rows, H100)}
    assert on_h100 == {"MFU in ": 0.49, "Float8 ": 1.3, "TorchTi": None}
    assert all(aim["measured"] is None for aim in gpu.targets(rows, "CPU"))
