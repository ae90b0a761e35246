"""Peak rates by the names that drivers give."""

import pytest

from torchtitan_lite.observability.hardware import PEAK_TFLOPS, mixed_peak_tflops, peak_tflops

KNOWN = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "AMD Instinct MI300X": 1307.0,
    "AMD Instinct MI300X OAM": 1307.0,
}

UNKNOWN = [
    "CPU",
    "",
    "NVIDIA GH200 480GB",
    "NVIDIA GH200 120GB",
    "NVIDIA GB200",
    "NVIDIA H20",
    "NVIDIA H800",
    "NVIDIA A10",
    "NVIDIA A100X",
    "NVIDIA B2000",
    "NVIDIA GeForce RTX 4090",
    "Tesla V100-SXM2-16GB",
    "AMD Instinct MI300A",
    "AMD Instinct MI250X",
]


@pytest.mark.parametrize(("name", "peak"), KNOWN.items())
def test_a_device_in_the_table_has_its_peak(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_device_that_is_not_in_the_table_has_none(name: str) -> None:
    assert peak_tflops(name) is None


def test_every_entry_of_the_table_is_reached() -> None:
    for name, bfloat16, float8 in PEAK_TFLOPS:
        assert (peak_tflops(f"VENDOR {name}"), peak_tflops(f"VENDOR {name}", "float8")) == (bfloat16, float8)
        # An entry further up that also matched would be taken in its place.
        assert next(entry for entry, *_ in PEAK_TFLOPS if entry in name) == name


def test_the_peak_of_a_mixture_is_that_of_its_times() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert mixed_peak_tflops(h100, 0.0) == 989.0
    assert mixed_peak_tflops(h100, 1.0) == pytest.approx(1979.0)
    # 800 TFLOP in float8 take 0.404 s, 200 in bfloat16 0.202 s.
    assert mixed_peak_tflops(h100, 0.8) == pytest.approx(1000 / (800 / 1979 + 200 / 989))
    assert mixed_peak_tflops("NVIDIA A100 80GB PCIe", 0.5) is None
    assert mixed_peak_tflops("CPU", 0.5) is None
