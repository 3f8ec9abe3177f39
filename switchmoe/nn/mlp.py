"""The dense feed-forward layer: the FFN between the sparse ones, and all of them in a dense model."""

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.config import check_choice
from switchmoe.experts import ACTIVATIONS
from switchmoe.nn.weights import fan_in_normal
from switchmoe.parallel import Layout, constrain
from switchmoe.shapes import Array, Float


class MLP(nnx.Module):
    """Pass every token through the same two matrices (three when gated), without biases.

    Parameters: `w_in_DF`, `w_out_FD`, and `w_gate_DF` when gated. Not gated it computes
    act(x w_in) w_out, gated (act(x w_gate) * (x w_in)) w_out, which is SwiGLU with "silu" and GEGLU with
    "gelu" (Shazeer 2020, https://arxiv.org/abs/2002.05202). Every matrix starts as a truncated normal of
    standard deviation sqrt(init_scale / fan_in).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        gated: bool = False,
        init_scale: float = 1.0,
        dtype: jax.typing.DTypeLike = "float32",
        param_dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        key = rngs.params()
        self.activation = activation
        self.dtype = jnp.dtype(dtype)
        self.gated = gated

        def draw(name: str, shape: tuple[int, int]) -> nnx.Param:
            return nnx.Param(fan_in_normal(key, name, shape, scale=init_scale, dtype=param_dtype))

        self.w_in_DF = draw("w_in_DF", (d_model, d_ff))
        self.w_out_FD = draw("w_out_FD", (d_ff, d_model))
        if gated:
            self.w_gate_DF = draw("w_gate_DF", (d_model, d_ff))

    def __call__(
        self, x: Float[Array, "*rows D"], *, layout: Layout | None = None
    ) -> Float[Array, "*rows D"]:
        """Transform every token on its own; products in the module's dtype, the result in the type of x.

        With a `layout`, x is [B, S, D], and its rows and the hidden features are split over a mesh.
        """
        activate = ACTIVATIONS[self.activation]
        narrow = x.astype(self.dtype)
        hidden = narrow @ self.w_in_DF[...].astype(self.dtype)
        if self.gated:
            hidden = activate(narrow @ self.w_gate_DF[...].astype(self.dtype)) * hidden
        else:
            hidden = activate(hidden)
        hidden = constrain(layout, hidden, "BSF")
        y = (hidden @ self.w_out_FD[...].astype(self.dtype)).astype(x.dtype)
        return constrain(layout, y, "BSD")
