"""Peak rates of devices, for model FLOPs utilisation."""

import re

# Dense bfloat16 matrix products (float32 accumulation), in FLOP/s of one device as jax counts devices, by
# words of `device_kind` in lower case; the first that fits counts.
# NVIDIA: data sheets, the figures without sparsity; the H100 of the PCIe card has 756, of SXM 989, as H200
# and the GPU of GH200, A100 312, L4 121; V100 (125) and T4 (65) have no bfloat16, so theirs are of float16.
# https://www.nvidia.com/en-us/data-center/
# TPU: per chip; on v2 and v3 jax sees the two cores of a chip as devices of half its rate each.
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
PEAK_BFLOAT16 = {
    "h200": 989e12,
    "gh200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "b200": 2250e12,
    "a100": 312e12,
    "l4": 121e12,
    "t4": 65e12,
    "v100": 125e12,
    "tpu v2": 22.5e12,
    "tpu v3": 61.5e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v5p": 459e12,
    "tpu v6": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of one device in FLOP/s, or None where it isn't known (every CPU)."""
    kind = device_kind.lower()
    # Whole words, since an L40S is no L4 and a T400 no T4.
    return next((peak for name, peak in PEAK_BFLOAT16.items() if re.search(rf"\b{name}\b", kind)), None)
