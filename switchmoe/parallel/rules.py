"""Which dimension of which array is split over which axis of the mesh: one dataclass."""

import dataclasses

from jax.sharding import PartitionSpec

from switchmoe.parallel.mesh import AXES

# Rules for the letters that end an array's name, by the legend of `switchmoe.shapes`: weights ...
_WEIGHTS = {"E": "experts", "D": "model", "F": "hidden", "H": "heads", "N": "heads", "V": "vocabulary"}
# ... and activations, whose model features are never split.
_ACTIVATIONS = {"B": "rows", "F": "hidden", "H": "heads", "N": "heads", "V": "vocabulary"}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis to mesh axis. A dimension without a rule is whole on every device.

    Attributes:
      rows: of a batch; several axes, the first varying slowest.
      experts: of the experts' weights; tokens travel over this axis, so it is one of those of `rows`.
      model: the model features D of a weight, where it is stored; it is gathered where it is used. One of
        those of `rows` too.
      hidden: the hidden features F of every FFN; not one of those of `rows`.
      heads: attention heads, those of keys and values too; not one of those of `rows`.
      vocabulary: of embedding and head; whole unless said, since few vocabularies divide.

    Raises:
      ValueError: one sentence, if two dimensions of one array would be split over the same axis.
    """

    rows: tuple[str, ...] = ("data", "fsdp", "expert")
    experts: str | None = "expert"
    model: str | None = "fsdp"
    hidden: str | None = "tensor"
    heads: str | None = "tensor"
    vocabulary: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(self.rows))  # a list would not be hashable
        for name in ("experts", "model", "hidden", "heads", "vocabulary"):
            axis = getattr(self, name)
            if axis is not None and axis not in AXES:
                raise ValueError(f"Rules.{name} is {axis!r}, which is no mesh axis; choose one of {AXES}.")
        if len(set(self.rows)) != len(self.rows) or not set(self.rows) <= set(AXES):
            raise ValueError(f"Rules.rows is {self.rows}, but needs different axes out of {AXES}.")
        for name in ("experts", "model"):
            axis = getattr(self, name)
            if axis is not None and axis not in self.rows:
                raise ValueError(
                    f"Rules.{name} is {axis!r}, which is not in Rules.rows={self.rows}, so devices along it "
                    f"would do the same work on the same rows; add it to rows."
                )
        for dims in ("EDF", "EFD", "DHA", "DNA", "HAD", "VD", "DV"):
            self.weight(dims)
        for dims in ("BSD", "BSF", "BSHA", "BSV"):
            self.activation(dims)

    def weight(self, dims: str, stacked: int = 0) -> PartitionSpec:
        """Say how a weight is stored: one letter a dimension, behind `stacked` whole ones (layers)."""
        return PartitionSpec(*[None] * stacked, *self._axes(dims, _WEIGHTS, "a weight"))

    def activation(self, dims: str) -> PartitionSpec:
        """Say how an activation is split: one letter a dimension."""
        return PartitionSpec(*self._axes(dims, _ACTIVATIONS, "an activation"))

    def _axes(self, dims: str, letters: dict[str, str], what: str) -> list:
        axes, taken = [], {}
        for letter in dims:
            rule = letters.get(letter)
            axis = None if rule is None else getattr(self, rule)
            for single in (axis,) if isinstance(axis, str) else axis or ():
                if single in taken:
                    raise ValueError(
                        f"Rules split two dimensions of {what} [{', '.join(dims)}] over the axis "
                        f"{single!r}, {taken[single]} and {rule}; give one of them another axis, or None."
                    )
                taken[single] = rule
            axes.append(axis)
        return axes
