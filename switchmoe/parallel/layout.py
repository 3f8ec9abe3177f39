"""How a model lies on a mesh: all that a layer, a model or a training step is told about devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from switchmoe.parallel.mesh import AXES, ExecutorName, MeshConfig, make_mesh
from switchmoe.parallel.rules import Rules
from switchmoe.shapes import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the rules that split arrays over it, and the way tokens travel; hashable, so static under jit.

    Attributes:
      mesh: from `make_mesh`.
      rules: logical axis to mesh axis.
      executor, chunks, ragged_buffer_factor: see `MeshConfig`.
    """

    mesh: Mesh
    rules: Rules = Rules()
    executor: ExecutorName | None = None
    chunks: int = 1
    ragged_buffer_factor: float | None = None

    def __post_init__(self):
        # One check for both: the sizes are known to be right, the rest is the same.
        MeshConfig(1, 1, 1, 1, self.executor, self.chunks, self.ragged_buffer_factor)
        if self.mesh.axis_names != AXES:
            raise ValueError(
                f"The mesh has the axes {self.mesh.axis_names}, but a layout needs {AXES}; make it with "
                "switchmoe.parallel.make_mesh."
            )

    def size(self, axes: str | tuple[str, ...] | None) -> int:
        """Count the devices along one axis or several."""
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def used(self, axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
        """Name those of the axes that have more than one device."""
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices, as jax names it."""
        return self.mesh.devices.flat[0].platform

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of more than one device over which rows are split."""
        return self.used(self.rules.rows)

    def trim(self, spec: PartitionSpec) -> PartitionSpec:
        """Leave out axes of one device, which split nothing."""
        kept = [self.used(axes) for axes in spec]
        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in kept))

    def weight_spec(self, dims: str, stacked: int = 0) -> PartitionSpec:
        """Say how a weight with these dimensions is stored, behind `stacked` whole ones."""
        return self.trim(self.rules.weight(dims, stacked))

    def batch_spec(self) -> PartitionSpec:
        """Say how anything with rows in front is split."""
        return PartitionSpec(self.row_axes or None)

    def sharding(self, spec: PartitionSpec | None = None) -> NamedSharding:
        """Place an array on the mesh; everywhere whole unless said."""
        return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

    def constrain(self, x: Array, dims: str) -> Array:
        """Keep an activation split as the rules say, whatever the weights around it would suggest."""
        return self.place(x, self.trim(self.rules.activation(dims)))

    def gather(self, weight: Array, dims: str) -> Array:
        """Put together, where it is used, what the axis of `Rules.model` keeps in parts."""
        whole = dataclasses.replace(self.rules, model=None)
        return self.place(weight, self.trim(whole.weight(dims)))

    def place(self, x: Array, spec: PartitionSpec) -> Array:
        """Split an array so, inside or outside jit."""
        if AxisType.Explicit in self.mesh.axis_types:
            return jax.reshard(x, self.sharding(spec))
        return lax.with_sharding_constraint(x, self.sharding(spec))


def constrain(layout: Layout | None, x: Array, dims: str) -> Array:
    """Do what `Layout.constrain` does where there is a layout."""
    return x if layout is None else layout.constrain(x, dims)


def make_layout(
    config: MeshConfig, *, devices: Sequence[Any] | None = None, rules: Rules | None = None
) -> Layout:
    """Make the mesh that a configuration asks for, and lay models out on it by the rules.

    Raises:
      ValueError: one sentence, if the devices do not allow it.
    """
    mesh = make_mesh(*(getattr(config, name) for name in AXES), devices=devices)
    return Layout(mesh, rules or Rules(), config.executor, config.chunks, config.ragged_buffer_factor)
