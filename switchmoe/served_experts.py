"""The expert FFNs laid out for generating on a CPU: every expert's matrices apart.

Reading weights is all that a token costs there. XLA:CPU multiplies by a whole array in place, but copies a
part of one first, so a stack of experts is read, written and read again; and with the outputs as a matrix's
rows, eight tokens read it nearly as fast as two. So each matrix is an array of its own, transposed, and only
experts with tokens are run (`switchmoe.served_execution`).
"""

from typing import NamedTuple

import jax.numpy as jnp

from switchmoe.config import Activation
from switchmoe.experts import ACTIVATIONS, ExpertParams
from switchmoe.quantized import (
    Halves,
    multiply_by_integers,
    multiply_halves,
    packed_in,
)
from switchmoe.shapes import Array, Float, Num


class Matrix(NamedTuple):
    """One matrix of one expert.

    Attributes:
      weight: transposed, [outputs, inputs], where it is float; the values of `quantize_weight` where it has
        scales.
      scale_QO: its scales, or None.
    """

    weight: Num[Array, "rows columns"]
    scale_QO: Float[Array, "Q O"] | None = None

    @property
    def outputs(self) -> int:
        """How many numbers it makes of a row."""
        return self.weight.shape[0 if self.scale_QO is None else 1]

    @property
    def inputs(self) -> int:
        """How many numbers a token has."""
        rows, columns = self.weight.shape
        return columns if self.scale_QO is None else rows * packed_in(self.weight)

    def times(self, x: Float[Array, "..."] | Halves) -> Float[Array, "..."]:
        """Multiply tokens by the matrix, in their type: as columns, or as rows where it has scales."""
        if isinstance(x, Halves):
            assert self.scale_QO is not None
            return multiply_halves(x, self.weight, self.scale_QO)
        if self.scale_QO is not None:
            return multiply_by_integers(x, self.weight, self.scale_QO)
        weight_OI = self.weight.astype(x.dtype)
        return jnp.matmul(weight_OI, x, preferred_element_type=jnp.float32).astype(x.dtype)


class ServedExpert(NamedTuple):
    """The matrices of one expert.

    Attributes:
      w_in: into the hidden features; with a gate, into the gate's behind them, so that one product makes
        both.
      w_out: out of them.
    """

    w_in: Matrix
    w_out: Matrix

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.w_in.outputs != self.w_out.inputs

    @property
    def token_axis(self) -> int:
        """The axis that tokens are on: 1 where they are columns, 0 where they are rows."""
        return 1 if self.w_in.scale_QO is None else 0

    def __call__(self, x: Float[Array, "..."] | Halves, activation: Activation) -> Float[Array, "..."]:
        """Transform tokens: act(x W_in) W_out, or (act(x W_gate) * (x W_in)) W_out."""
        act, hidden = ACTIVATIONS[activation], self.w_in.times(x)
        if self.gated:
            hidden, gate = jnp.split(hidden, 2, axis=1 - self.token_axis)
            return self.w_out.times(hidden * act(gate))
        return self.w_out.times(act(hidden))


class ServedExperts(NamedTuple):
    """All experts of a layer, one by one; stands in the place of `ExpertParams` where a model generates."""

    experts: tuple[ServedExpert, ...]
    trainable = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many experts there are, and their D and F."""
        w_out = self.experts[0].w_out
        return len(self.experts), w_out.outputs, w_out.inputs

    @property
    def gated(self) -> bool:
        """Whether they have a gate."""
        return self.experts[0].gated


def serve_experts(params: ExpertParams) -> ServedExperts:
    """Take the experts of a layer out of their stack; what they say to a token stays the same.

    The weights are copied: `params` may be dropped then.
    """

    matrices = params.matrices

    def join(expert: int, *names: str) -> Matrix:
        """Join matrices side by side."""
        scales = [scale[expert] for _, scale in (matrices[name] for name in names) if scale is not None]
        weight = jnp.concatenate([matrices[name][0][expert] for name in names], axis=-1)
        return Matrix(weight, jnp.concatenate(scales, axis=-1)) if scales else Matrix(weight.T)

    into = ("w_in", "w_gate") if params.gated else ("w_in",)
    experts = range(len(params.w_in_EDF))
    return ServedExperts(tuple(ServedExpert(join(e, *into), join(e, "w_out")) for e in experts))
