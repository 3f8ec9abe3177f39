"""Grouped matmul backends by name."""

from switchmoe.dispatching.grouped.base import Backend
from switchmoe.dispatching.grouped.blocks import BLOCKS
from switchmoe.dispatching.grouped.few import FEW
from switchmoe.dispatching.grouped.loop import LOOP
from switchmoe.dispatching.grouped.megablox import MEGABLOX
from switchmoe.dispatching.grouped.mosaic_gpu import MOSAIC_GPU
from switchmoe.dispatching.grouped.ragged_dot import RAGGED_DOT

BACKENDS: dict[str, Backend] = {
    "loop": LOOP,
    "blocks": BLOCKS,
    "few": FEW,
    "ragged_dot": RAGGED_DOT,
    "megablox": MEGABLOX,
    "mosaic_gpu": MOSAIC_GPU,
}

# What None takes, best first; "blocks" where a platform is not named or none of its own can run.
FASTEST: dict[str, tuple[str, ...]] = {"tpu": ("megablox",), "cuda": ("few", "mosaic_gpu")}

__all__ = ["BACKENDS", "FASTEST", "Backend"]
