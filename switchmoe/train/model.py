"""A language model as two pure functions of its weights, which is what a training step wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from switchmoe.models import LMConfig, TransformerLM
from switchmoe.shapes import ScalarKey

Params = dict[str, Any]


class PureModel(NamedTuple):
    """A model without state.

    Attributes:
      init: `(key) -> params`, nested dictionaries of arrays.
      apply: `(params, ids_BS, *, segments_BS, positions_BS, mask_BS, train, key) -> (logits_BSV, aux)`.
      bind: `(params) -> TransformerLM`, the Flax module with these weights.
    """

    init: Callable[[ScalarKey], Params]
    apply: Callable[..., Any]
    bind: Callable[[Params], TransformerLM]


def pure_model(config: LMConfig) -> PureModel:
    """Split the Flax model of `config` into its weights and the functions that use them."""

    def build(key: ScalarKey) -> TransformerLM:
        return TransformerLM(config, rngs=nnx.Rngs(params=key))

    def init(key: ScalarKey) -> Params:
        return nnx.to_pure_dict(nnx.split(build(key), nnx.Param, ...)[1])

    graph, params, other = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)
    other = [
        path for path, variable in nnx.to_flat_state(other) if not issubclass(variable.type, nnx.RngState)
    ]
    if other:
        raise NotImplementedError(
            f"the model keeps state beside its weights, which training would lose: {other}."
        )

    def bind(params: Params) -> TransformerLM:
        return nnx.merge(graph, params)

    def apply(params: Params, ids_BS: jax.Array, **inputs: Any) -> Any:
        return bind(params)(ids_BS, **inputs)

    return PureModel(init, apply, bind)
