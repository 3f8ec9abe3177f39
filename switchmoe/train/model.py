"""A language model as two pure functions of its weights, which is what a training step wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from switchmoe.models import LMConfig, TransformerLM
from switchmoe.nn import BalanceBias
from switchmoe.parallel import Layout
from switchmoe.shapes import ScalarKey

Params = dict[str, Any]

# The name of every balance bias, and of nothing else.
_BIAS = "bias_E"


class PureModel(NamedTuple):
    """A model without state: whatever it keeps, weights and balance biases, is in its `Params`.

    Attributes:
      init: `(key) -> params`, nested dictionaries of arrays.
      apply: `(params, ids_BS, *, segments_BS, positions_BS, mask_BS, train, key) -> (logits_BSV, aux)`.
      bind: `(params) -> TransformerLM`, the Flax module with these weights.
      layout: how `apply` splits its work over a mesh; None for one device.
    """

    init: Callable[[ScalarKey], Params]
    apply: Callable[..., Any]
    bind: Callable[[Params], TransformerLM]
    layout: Layout | None = None


def pure_model(config: LMConfig, layout: Layout | None = None) -> PureModel:
    """Split the Flax model of `config` into its weights and the functions that use them, on a mesh or not."""

    def build(key: ScalarKey) -> TransformerLM:
        return TransformerLM(config, rngs=nnx.Rngs(params=key))

    def init(key: ScalarKey) -> Params:
        return nnx.to_pure_dict(nnx.split(build(key), (nnx.Param, BalanceBias), ...)[1])

    graph, kept, other = nnx.split(
        nnx.eval_shape(lambda: build(jax.random.key(0))), (nnx.Param, BalanceBias), ...
    )
    lost = [
        path for path, variable in nnx.to_flat_state(other) if not issubclass(variable.type, nnx.RngState)
    ]
    lost += [
        path
        for path, variable in nnx.to_flat_state(kept)
        if issubclass(variable.type, BalanceBias) != (path[-1] == _BIAS)
    ]
    if lost:
        raise NotImplementedError(
            f"the model keeps state beside weights and balance biases, which training would lose: {lost}."
        )

    def bind(params: Params) -> TransformerLM:
        return nnx.merge(graph, params)

    def apply(params: Params, ids_BS: jax.Array, **inputs: Any) -> Any:
        return bind(params)(ids_BS, layout=layout, **inputs)

    return PureModel(init, apply, bind, layout)


def split_biases(params: Params) -> tuple[Params, Params]:
    """Part what the optimizer changes from the balance biases, which `update_bias` does; {} for none."""
    weights, biases = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner_weights, inner_biases = split_biases(value)
            weights[name] = inner_weights
            if inner_biases:
                biases[name] = inner_biases
        else:
            (biases if name == _BIAS else weights)[name] = value
    return weights, biases


def join_biases(weights: Params, biases: Params) -> Params:
    """Put the two parts of `split_biases` together again."""
    joined = dict(weights)
    for name, value in biases.items():
        joined[name] = join_biases(weights[name], value) if isinstance(value, dict) else value
    return joined
