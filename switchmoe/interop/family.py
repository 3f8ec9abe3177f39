"""What a family of Hugging Face's models is to us: its names for weights, and its configuration both ways."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from switchmoe.interop.names import Named
from switchmoe.interop.settings import Settings
from switchmoe.models import LMConfig


class Family(NamedTuple):
    """One family.

    Attributes:
      model_type: as config.json has it.
      architecture: the class in transformers that loads it.
      table: of the weights' names.
      read: config.json -> LMConfig.
      write: LMConfig -> what of config.json depends on it; raises a WeightsError if the model is no such one.
      copies: names that may be in a file a second time, by the tensor they are copies of.
      noise: a pattern of names to pass over.
    """

    model_type: str
    architecture: str
    table: Mapping[str, Named]
    read: Callable[[Settings], LMConfig]
    write: Callable[[LMConfig], dict[str, Any]]
    copies: Mapping[str, str] = {}
    noise: str = ""
