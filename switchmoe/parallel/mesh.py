"""The mesh of devices: four axes by name, sizes filled in, and a sentence where they cannot be."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from switchmoe.config import check_at_least, check_choice

AXES = ("data", "fsdp", "expert", "tensor")
AxisTypes = Literal["auto", "explicit"]
ExecutorName = Literal["all_to_all", "all_gather", "ragged_all_to_all"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis, and how tokens travel between them.

    Neither changes what a run computes, except a `ragged_buffer_factor` that is too small. Each device of
    the axes data, fsdp and expert has rows of its own in the batch.

    Attributes:
      data: devices with copies of all weights; -1 takes those that the other axes leave.
      fsdp: devices that share the storage of every weight, and gather it where it is used.
      expert: devices that share the experts; tokens travel to them.
      tensor: devices that share every attention head and FFN, and have the same rows.
      executor: how tokens travel: "all_to_all" (seats), "all_gather" (every device sees the tokens), or
        "ragged_all_to_all" (dropless); None chooses.
      chunks: parts of a device's groups, of which one can travel while the experts work on another. On TPU
        this needs LIBTPU_INIT_ARGS=--xla_tpu_enable_async_all_to_all=true in the environment.
      ragged_buffer_factor: rows that a device has room for, over those it sends, with "ragged_all_to_all";
        None has room, and takes memory, for all that can come: what every device along the axis sends. A
        smaller factor drops what does not fit, counted in `dropped`.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    executor: ExecutorName | None = None
    chunks: int = 1
    ragged_buffer_factor: float | None = None

    def __post_init__(self):
        _check_sizes({name: getattr(self, name) for name in AXES}, "mesh.")
        if self.executor is not None:
            check_choice("executor", self.executor, get_args(ExecutorName))
        check_at_least("chunks", self.chunks, 1)
        factor = self.ragged_buffer_factor
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(
                f"ragged_buffer_factor is {factor}, but must be a finite number above 0; None has room for "
                "every token."
            )


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    axis_types: AxisTypes = "auto",
) -> Mesh:
    """Arrange devices along the axes data, fsdp, expert and tensor, the last ones nearest to each other.

    One size may be -1 and takes the devices that the others leave. A mesh may use fewer devices than there
    are, the first ones, except where several processes would be left without any. Where devices stand in
    several TPU slices, data goes across the slices and everything else stays inside one.

    Args:
      data, fsdp, expert, tensor: devices along each axis; see `MeshConfig`.
      devices: those to use; all of `jax.devices()` unless given.
      axis_types: whether jax follows shardings by itself ("auto") or they are part of the types of arrays
        ("explicit"), with which `parallel.moe` works, but not our models.

    Raises:
      ValueError: one sentence, if the sizes do not fit the devices.
    """
    check_choice("axis_types", axis_types, get_args(AxisTypes))
    # Slice by slice, so that fewer devices than there are stand in as few slices as they can.
    devices = sorted(jax.devices() if devices is None else devices, key=_slice)
    sizes = _fill_in(dict(zip(AXES, (data, fsdp, expert, tensor), strict=True)), len(devices))
    used = math.prod(sizes.values())
    _check_processes(sizes, devices[:used], devices)
    devices = devices[:used]
    types = (AxisType.Auto if axis_types == "auto" else AxisType.Explicit,) * len(AXES)
    return Mesh(_arrange(sizes, devices), AXES, axis_types=types)


def _arrange(sizes: dict[str, int], devices: list) -> np.ndarray:
    """Put devices that are near each other into neighbouring places, data across slices."""
    shape = tuple(sizes.values())
    in_slice = collections.Counter(_slice(device) for device in devices)
    if len(in_slice) == 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (AssertionError, NotImplementedError, ValueError):
            # Some of a TPU's chips, which fill no box. They still make a mesh, if not the fastest.
            return np.array(devices).reshape(shape)
    if len(set(in_slice.values())) > 1 or sizes["data"] % len(in_slice):
        raise ValueError(
            f"mesh.data={sizes['data']} with {len(devices)} devices does not go across {len(in_slice)} "
            f"slices of {max(in_slice.values())}, each of which has to take an equal part of the data axis "
            "and nothing else; make data a multiple of the slices, and the mesh of whole slices."
        )
    inside = (sizes["data"] // len(in_slice), *shape[1:])
    across = (len(in_slice), 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def _slice(device: Any) -> int:
    """Which TPU slice a device is in; a GPU calls its host that, and between hosts every axis may go."""
    return 0 if device.platform == "gpu" else getattr(device, "slice_index", 0)


def _check_sizes(sizes: dict[str, int], prefix: str = "") -> None:
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"{prefix}{name} is {size}, but must be at least 1, or -1 for the devices that are left."
            )
    open_ = [name for name, size in sizes.items() if size == -1]
    if len(open_) > 1:
        raise ValueError(
            f"{' and '.join(prefix + name for name in open_)} are -1, but only one axis can take the devices "
            "that are left; give the others a size."
        )


def _fill_in(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Put a number in the place of -1."""
    _check_sizes(sizes)
    if count == 0:
        raise ValueError("A mesh needs at least one device, but devices is empty.")
    said = ", ".join(f"{name}={size}" for name, size in sizes.items() if size not in (1, -1))
    asked = math.prod(size for size in sizes.values() if size != -1)
    if asked > count:
        raise ValueError(
            f"The mesh ({said}) needs {asked} devices, but there are {count}; lower a size (on a CPU, "
            "JAX_NUM_CPU_DEVICES=N simulates N devices)."
        )
    if -1 in sizes.values() and count % asked:
        name = next(name for name, size in sizes.items() if size == -1)
        raise ValueError(
            f"The mesh ({said}) does not divide the {count} devices, so {name}=-1 has no size; change a "
            f"size, or give {name} one."
        )
    return {name: count // asked if size == -1 else size for name, size in sizes.items()}


def _check_processes(sizes: dict[str, int], used: list, devices: list) -> None:
    """Make sure that each process has a device in the mesh, or it could not take part in anything."""
    idle = {device.process_index for device in devices} - {device.process_index for device in used}
    if idle:
        shape = " x ".join(str(size) for size in sizes.values())
        raise ValueError(
            f"The mesh {shape} leaves process {min(idle)} without a device; use all {len(devices)} devices, "
            "or start fewer processes."
        )
