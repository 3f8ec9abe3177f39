"""Reading a config.json setting by setting, with a sentence for each that can't be had."""

from collections.abc import Mapping
from typing import Any

from switchmoe.interop.errors import WeightsError

# Theirs -> ours. Hugging Face's "gelu" is the exact one; T5's and ours is the tanh approximation.
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu_new"}
_NEEDED = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}


class Settings:
    """The settings of a config.json.

    Attributes:
      what: how to call the file in a message.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self._values = values
        self.what = what

    def take(self, *names: str, default: Any = _NEEDED, kind: type = int) -> Any:
        """Read a setting that goes by one of these names; None counts as not being there.

        Raises:
          WeightsError: it is not there and has no default, or it is not of this kind.
        """
        name = next((name for name in names if self._values.get(name) is not None), None)
        if name is None:
            if default is _NEEDED:
                raise WeightsError(
                    f"{self.what} has no {names[0]}, without which the model's shape is unknown."
                )
            return default
        value = self._values[name]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise WeightsError(f"{self.what} has {name}={value!r}, but must have {_KINDS[kind]} there.")
        return kind(value)

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Raise a WeightsError if a setting is there with a value that the model can't have."""
        value = self._values.get(name)
        if value is not None and value not in allowed:
            may = (
                f"only {' or '.join(map(repr, allowed))} is supported" if allowed else "that is not supported"
            )
            raise WeightsError(f"{self.what} has {name}={value!r}, but {may}.")

    def activation(self, name: str, default: str) -> str:
        """Read the name of an activation as ours."""
        theirs = self.take(name, default=default, kind=str)
        if theirs not in ACTIVATIONS:
            raise WeightsError(
                f"{self.what} has {name}={theirs!r}, but only {', '.join(ACTIVATIONS)} are supported"
                f"{' (gelu there is the exact one)' if theirs == 'gelu' else ''}."
            )
        return ACTIVATIONS[theirs]

    def rope_theta(self, default: float) -> float:
        """Read the base of rotary positions, from rope_parameters or, as older files have it, from the top.

        Raises:
          WeightsError: positions are scaled in some way, or not all features are turned.
        """
        self.refuse_unless("rope_scaling")
        self.refuse_unless("partial_rotary_factor", 1, 1.0)
        rope = self.take("rope_parameters", default={}, kind=dict)
        for name, allowed in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
            if rope.get(name, allowed) != allowed:
                raise WeightsError(
                    f"{self.what} has rope_parameters with {name}={rope[name]!r}, but only {allowed!r} is "
                    "supported."
                )
        inside = Settings(rope, f"rope_parameters in {self.what}")
        return inside.take(
            "rope_theta", default=self.take("rope_theta", default=default, kind=float), kind=float
        )


def refuse_different(family: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise a WeightsError that names the settings in which a model is not of a family.

    Args:
      family: what their models are called.
      ours: settings of the model.
      theirs: the same settings as every model of the family has them.
    """
    different = [
        f"{name}={ours[name]!r} where they have {theirs[name]!r}"
        for name in theirs
        if ours[name] != theirs[name]
    ]
    if different:
        raise WeightsError(
            f"this model can't be written as one of Hugging Face's {family} models, since it has "
            f"{', '.join(different)}."
        )
