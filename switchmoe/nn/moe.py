"""The sparse feed-forward layer as a Flax NNX module, around the pure functions of `switchmoe.layer`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.experts import ExpertParams
from switchmoe.layer import MoEParams, Trace, init_moe, moe, moe_with_trace
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Bool, Float, ScalarKey


class MoE(nnx.Module):
    """Send every token to k experts out of E and return the weighted sum of what they make of it.

    Parameters: `router_DE` (always float32), `w_in_EDF`, `w_out_EFD`, and `w_gate_EDF` when gated; no biases,
    nothing else. `dtype` is the type the experts compute in (that of x if None); the router computes in
    float32 whatever it is (Switch Transformers, section 2.4, selective precision).
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ) -> None:
        self.config = config
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        params = init_moe(rngs.params(), config, dtype=jnp.dtype(param_dtype))
        self.router_DE = nnx.Param(params.router_DE)
        self.w_in_EDF = nnx.Param(params.experts.w_in_EDF)
        self.w_out_EFD = nnx.Param(params.experts.w_out_EFD)
        if params.experts.w_gate_EDF is not None:
            self.w_gate_EDF = nnx.Param(params.experts.w_gate_EDF)

    def params(self) -> MoEParams:
        """Hand the weights over in the form that `switchmoe.moe` takes."""
        gate = self.w_gate_EDF[...] if self.config.gated else None
        return MoEParams(self.router_DE[...], ExpertParams(self.w_in_EDF[...], self.w_out_EFD[...], gate))

    def __call__(
        self,
        x: Float[Array, "*batch S D"],
        *,
        train: bool = False,
        key: ScalarKey | None = None,
        mask: Bool[Array, "*batch S"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "*batch S D"], MoEAux]:
        """Transform the tokens of x, group by group; see `switchmoe.moe` for the arguments and the errors.

        `options` are handed on to it: bias, first_group, execute, sum_across.
        Returns the output in the type of x, exactly 0 for a dropped token, and the sums of `MoEAux`.
        """
        y, aux = moe(self.params(), self._narrow(x), self.config, train=train, key=key, mask=mask, **options)
        return y.astype(x.dtype), aux

    def trace(
        self,
        x: Float[Array, "*batch S D"],
        *,
        train: bool = False,
        key: ScalarKey | None = None,
        mask: Bool[Array, "*batch S"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "*batch S D"], MoEAux, Trace]:
        """Do what a call does, and say which experts each token chose and which of them had a seat for it."""
        y, aux, where = moe_with_trace(
            self.params(), self._narrow(x), self.config, train=train, key=key, mask=mask, **options
        )
        return y.astype(x.dtype), aux, where

    def _narrow(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return x if self.dtype is None else x.astype(self.dtype)
