"""The sparse feed-forward layer as a Flax NNX module, around the pure functions of `switchmoe.layer`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.experts import ExpertParams, quantize_experts
from switchmoe.layer import MoEParams, Trace, init_moe, moe, moe_with_trace
from switchmoe.parallel import Layout
from switchmoe.parallel import moe as moe_on_mesh
from switchmoe.parallel import moe_with_trace as moe_on_mesh_with_trace
from switchmoe.routing import MoEAux, RouterParams
from switchmoe.served_experts import serve_experts
from switchmoe.shapes import Array, Bool, Float, ScalarKey


class BalanceBias(nnx.Variable):
    """How much easier or harder it is to choose each expert: a layer's state, which no optimizer sees."""


class MoE(nnx.Module):
    """Send every token to k experts out of E and return the weighted sum of what they make of it.

    Parameters: the router's, always float32, `router_DE` for most, what the router's own names are for the
    others (none for "hash"); `w_in_EDF`, `w_out_EFD`, and `w_gate_EDF` when gated; the same three with
    `shared_` in front for shared experts, as one expert (an E of 1). No biases, nothing else. `dtype` is the
    type the experts compute in (that of x if None); the router computes in float32 whatever it is (Switch
    Transformers, section 2.4, selective precision).

    With `config.bias_step` the layer keeps a balance bias `bias_E` of type `BalanceBias`, float32, zero at
    first, which every call adds to the scores for the choice. Nothing here changes it: do that once an
    optimizer step, outside the gradient:

        layer.bias_E[...] = update_bias(layer.bias_E[...], aux.load_E, config.bias_step)
    """

    # Which of these a layer has depends on its config.
    router_DE: nnx.Param
    w_gate_EDF: nnx.Param
    served: nnx.Param
    bias_E: BalanceBias

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
        router = _name_weights(params.router)
        self.router_names = tuple(router)
        self.router_tree = jax.tree.structure(params.router)
        for name, weight in router.items():
            setattr(self, name, nnx.Param(weight))
        assert isinstance(params.experts, ExpertParams)
        self._hold("", params.experts)
        if params.shared is not None:
            self._hold("shared_", params.shared)
        if config.bias_step > 0:
            self.bias_E = BalanceBias(jnp.zeros((config.num_experts,), jnp.float32))

    def params(self) -> MoEParams:
        """Hand the weights over in the form that `switchmoe.moe` takes."""
        router = jax.tree.unflatten(
            self.router_tree, [getattr(self, name)[...] for name in self.router_names]
        )
        shared = self._experts("shared_") if self.config.shared_experts else None
        served = getattr(self, "served", None)
        experts = self._experts("") if served is None else served.get_value()
        return MoEParams(router, experts, shared)

    def quantize(self, bits: int = 8) -> None:
        """Round the experts' weights, shared ones too, to 8 or 4 bits; see `quantize_experts`.

        Raises:
          ValueError: one sentence, if they are rounded or laid out already, or can't be rounded so.
        """
        if hasattr(self, "served"):
            raise ValueError("These experts are laid out for generating; round the ones they were made of.")
        for prefix in ("", "shared_")[: 2 if self.config.shared_experts else 1]:
            self._hold(prefix, quantize_experts(self._experts(prefix), bits))

    def serve(self) -> None:
        """Lay the experts out for generating on a CPU: `served` takes the place of their weights.

        See `switchmoe.served_experts`; shared experts stay as they are.
        """
        experts = self._experts("")
        self.served = nnx.Param(serve_experts(experts))
        for name, weight in experts._asdict().items():
            if weight is not None:
                delattr(self, name)

    def _hold(self, prefix: str, experts: ExpertParams) -> None:
        for name, weight in experts._asdict().items():
            if weight is not None:
                setattr(self, prefix + name, nnx.Param(weight))

    def _experts(self, prefix: str) -> ExpertParams:
        names = [name for name in ExpertParams._fields if hasattr(self, prefix + name)]
        return ExpertParams(**{name: getattr(self, prefix + name)[...] for name in names})

    def __call__(
        self,
        x: Float[Array, "*batch S D"],
        *,
        train: bool = False,
        key: ScalarKey | None = None,
        mask: Bool[Array, "*batch S"] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "*batch S D"], MoEAux]:
        """Transform the tokens of x, group by group; see `switchmoe.moe` for the arguments and the errors.

        `layout` says how experts and rows are split over a mesh; None for one device. `options` are handed
        on: token_ids, bias (instead of the layer's own), replay. Returns the output in the type of x, exactly
        0 for a dropped token (or what the shared experts say), and the sums of `MoEAux`.
        """
        run = moe if layout is None else functools.partial(moe_on_mesh, layout=layout)
        inputs: dict[str, Any] = dict(train=train, key=key, mask=mask) | self._bias(options)
        y, aux = run(self.params(), self._narrow(x), self.config, **inputs)
        return y.astype(x.dtype), aux

    def trace(
        self,
        x: Float[Array, "*batch S D"],
        *,
        train: bool = False,
        key: ScalarKey | None = None,
        mask: Bool[Array, "*batch S"] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "*batch S D"], MoEAux, Trace]:
        """Do what a call does, and say which experts each token chose and which of them had a seat for it."""
        run = moe_with_trace if layout is None else functools.partial(moe_on_mesh_with_trace, layout=layout)
        inputs: dict[str, Any] = dict(train=train, key=key, mask=mask) | self._bias(options)
        y, aux, where = run(self.params(), self._narrow(x), self.config, **inputs)
        return y.astype(x.dtype), aux, where

    def _narrow(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return x if self.dtype is None else x.astype(self.dtype)

    def _bias(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.config.bias_step > 0 and options.get("bias") is None:
            return options | {"bias": self.bias_E[...]}
        return options


def _name_weights(router: RouterParams) -> dict[str, Array]:
    """Name a router's weights, in the order of its leaves: a NamedTuple's by its fields."""
    if isinstance(router, jax.Array):
        return {"router_DE": router}
    names = getattr(router, "_fields", ())
    if len(names) != len(jax.tree.leaves(router)):
        raise ValueError(
            f"The router's weights are a {type(router).__name__}, but nn.MoE holds one array, a NamedTuple "
            "of arrays, or (); let the router's init return one of these."
        )
    return router._asdict() if names else {}
