"""The layer benchmark's command line, and the outside implementations it names."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from switchmoe.config import Activation, Dispatch
from switchmoe.dispatching.grouped_matmul import choose_backend
from switchmoe.train import RunError

if __package__:  # imported as benchmarks.settings
    from benchmarks import cases
else:  # beside a script, which finds its neighbours by their own names
    import cases


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time the MoE layer against a dense FFN and its bare experts.

    Attributes:
      json: file for the results.
      sizes: sizes to time, each as TOKENS:EXPERTS.
      factors: capacity factors.
      dispatches: ways to carry tokens to their experts.
      matmuls: backends of the dropless experts to time beside the one that is chosen by itself.
      modes: forward alone, or with the gradients.
      d_model: features of a token.
      d_ff: hidden features of an expert.
      top_k: experts a token is sent to.
      activation: of the experts and the dense FFN.
      dtype: of tokens and weights.
      rounds: interleaved rounds; the least time counts.
      extra: outside implementations, as module:function.
    """

    json: Path | None = None
    sizes: tuple[str, ...] = ("4096:8", "4096:32", "4096:64", "4096:128", "16384:64")
    factors: tuple[float, ...] = (1.0, 1.25)
    dispatches: tuple[Dispatch, ...] = cases.DISPATCHES
    matmuls: tuple[str, ...] = ()
    modes: tuple[cases.Mode, ...] = get_args(cases.Mode)
    d_model: int = 512
    d_ff: int = 2048
    top_k: int = 1
    activation: Activation = "relu"
    dtype: str = "float32"
    rounds: int = 7
    extra: tuple[str, ...] = ()

    def shapes(self) -> list[tuple[int, int]]:
        """Read the sizes as (tokens, experts).

        Raises:
          ValueError: one sentence, if one is not two numbers.
        """
        return read_sizes(self.sizes)

    def check(self) -> None:
        """Raise a ValueError that says what to change, before anything is compiled."""
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, but must be at least 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not known; use float32 or bfloat16.")
        if not (self.sizes and self.factors and self.modes):
            raise ValueError("There is nothing to time; give at least one of sizes, factors and modes.")
        for name in self.matmuls:
            choose_backend(name)
        for _, num_experts in self.shapes():
            for factor in self.factors:
                cases.layer_config(num_experts=num_experts, capacity_factor=factor, **self.widths())

    def widths(self) -> dict[str, Any]:
        """What all sizes have in common."""
        return {name: getattr(self, name) for name in ("d_model", "d_ff", "top_k", "activation")}


def read_sizes(sizes: Sequence[str]) -> list[tuple[int, int]]:
    """Read sizes written TOKENS:EXPERTS.

    Raises:
      ValueError: one sentence, if one is not two numbers.
    """
    shapes = []
    for size in sizes:
        parts = size.split(":")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"The size {size!r} is not TOKENS:EXPERTS; write it like 4096:8.")
        shapes.append((int(parts[0]), int(parts[1])))
    return shapes


def load_extra(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Import the functions that bring outside implementations.

    Raises:
      RunError: one sentence, if there is no such module or function.
    """
    functions = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            functions.append(getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError, ValueError) as error:
            raise RunError(
                f"--extra {name} can't be loaded ({error}); write it as module:function, "
                "with the module on PYTHONPATH."
            ) from error
    return functions
