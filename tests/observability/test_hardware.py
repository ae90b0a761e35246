"""Peak rates by the names that drivers give."""

import pytest

from torchtitan_lite.observability.hardware import PEAK_TFLOPS_BF16, peak_tflops

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
    for name, peak in PEAK_TFLOPS_BF16:
        assert peak_tflops(f"VENDOR {name}") == peak
        # An entry further up that also matched would be taken in its place.
        assert next(entry for entry, _ in PEAK_TFLOPS_BF16 if entry in name) == name
