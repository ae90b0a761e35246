"""Peak matrix rates of devices, for MFU. Dense bf16 without sparsity, from the vendors' data sheets."""

import re

# The first whose words stand in the device's name counts, so a special form comes before the general one.
PEAK_TFLOPS_BF16 = (
    ("H100 PCIe", 756.0),  # NVIDIA H100 data sheet: 1,513 with sparsity
    ("H100 NVL", 835.0),  # NVIDIA H100 NVL data sheet: 1,671 with sparsity
    ("H100", 989.0),  # SXM; NVIDIA H100 data sheet: 1,979 with sparsity
    ("H200 NVL", 835.0),  # NVIDIA H200 data sheet: 1,671 with sparsity
    ("H200", 989.0),  # NVIDIA H200 data sheet: 1,979 with sparsity
    ("A100", 312.0),  # NVIDIA A100 data sheet, PCIe and SXM alike
    ("B200", 2250.0),  # NVIDIA DGX B200 data sheet: 36 PFLOPS with sparsity over 8
    ("MI300X", 1307.0),  # AMD Instinct MI300X data sheet: 1,307.4
)


def peak_tflops(device_name: str) -> float | None:
    """Peak TFLOP/s of a device by the name that torch gives it, None where it is not in the table."""
    if "MIG" in device_name:  # a slice of a device
        return None
    # Whole words: a GH200 is no H200, a GB200 no B200.
    return next((peak for name, peak in PEAK_TFLOPS_BF16 if re.search(rf"\b{name}\b", device_name)), None)
