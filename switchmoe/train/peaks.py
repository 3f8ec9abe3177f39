"""Peak rates of devices, for model FLOPs utilisation."""

# Dense bfloat16 matrix products (float32 accumulation), in FLOP/s of one device as jax counts devices, by a
# part of `device_kind` in lower case; the first that fits counts.   NVIDIA: data sheets, the figures
# without sparsity; H100 PCIe 756, SXM 989, H200 989, A100 312, L4 121, T4 has no   bfloat16 (65 is its
# float16 rate), V100 125 (float16). https://www.nvidia.com/en-us/data-center/   TPU:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, per chip; jax sees two cores of half a chip
# each on v2 and v3.
PEAK_BFLOAT16 = {
    "h200": 989e12,
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
    "tpu v6": 918e12,
    "tpu7x": 1153e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of one device in FLOP/s, or None where it isn't known (every CPU)."""
    kind = device_kind.lower()
    return next((peak for name, peak in PEAK_BFLOAT16.items() if name in kind), None)
