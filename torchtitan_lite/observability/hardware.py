"""Peak matrix rates of devices, for MFU. Dense, without sparsity, from the vendors' data sheets."""

import re
from typing import Literal

# Device, TFLOP/s in bfloat16, in float8 (None where it has no such products). The first whose words stand in the
# device's name counts, so a special form comes before the general one.
PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    ("H100 PCIe", 756.0, 1513.0),  # NVIDIA H100 data sheet: 1,513 and 3,026 with sparsity
    ("H100 NVL", 835.0, 1671.0),  # NVIDIA H100 NVL data sheet: 1,671 and 3,341 with sparsity
    ("H100", 989.0, 1979.0),  # SXM; NVIDIA H100 data sheet: 1,979 and 3,958 with sparsity
    ("H200 NVL", 835.0, 1671.0),  # NVIDIA H200 data sheet: 1,671 and 3,341 with sparsity
    ("H200", 989.0, 1979.0),  # NVIDIA H200 data sheet: 1,979 and 3,958 with sparsity
    ("A100", 312.0, None),  # NVIDIA A100 data sheet, PCIe and SXM alike
    ("B200", 2250.0, 4500.0),  # NVIDIA DGX B200 data sheet: 36 and 72 PFLOPS with sparsity over 8
    ("MI300X", 1307.0, 2615.0),  # AMD Instinct MI300X data sheet: 1,307.4 and 2,614.9
)


def peak_tflops(device_name: str, products: Literal["bfloat16", "float8"] = "bfloat16") -> float | None:
    """Peak TFLOP/s of a device by the name that torch gives it, None where the table has none."""
    if "MIG" in device_name:  # a slice of a device
        return None
    # Whole words: a GH200 is no H200, a GB200 no B200.
    known = (peaks for name, *peaks in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name))
    bfloat16, float8 = next(known, (None, None))
    return float8 if products == "float8" else bfloat16


def mixed_peak_tflops(device_name: str, float8_share: float) -> float | None:
    """The rate of a device that does `float8_share` of its FLOPs at its peak in float8, the rest at that in bfloat16;
    None where it has no such peak."""
    bfloat16, float8 = peak_tflops(device_name), peak_tflops(device_name, "float8")
    if bfloat16 is None or float8 is None:
        return None
    # Times add up, not rates.
    return 1 / (float8_share / float8 + (1 - float8_share) / bfloat16)
