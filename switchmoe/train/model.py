"""A language model as two pure functions of its weights, which is what a training step wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.adapters import draw_adapters, merge_adapters
from switchmoe.nn import BalanceBias
from switchmoe.parallel import Layout
from switchmoe.shapes import ScalarKey, named_key
from switchmoe.train.settings import TuneConfig

Params = dict[str, Any]

# The name of every balance bias, and of nothing else.
BIAS = "bias_E"


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
        if issubclass(variable.type, BalanceBias) != (path[-1] == BIAS)
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


def adapted_model(model: PureModel, tune: TuneConfig) -> PureModel:
    """Give a model what `tune.part` asks for beside its own weights: adapters of its experts, or nothing.

    They are drawn with the weights and are merged into the experts wherever the model is used, so it is
    itself at first, and no layer knows about them.
    """
    if tune.part != "lora":
        return model

    def init(key: ScalarKey) -> Params:
        return draw_adapters(model.init(key), rank=tune.lora_rank, key=named_key(key, "adapters"))

    def merge(params: Params) -> Params:
        return merge_adapters(params, alpha=tune.lora_alpha, layout=model.layout)

    def apply(params: Params, ids_BS: jax.Array, **inputs: Any) -> Any:
        return model.apply(merge(params), ids_BS, **inputs)

    return PureModel(init, apply, lambda params: model.bind(merge(params)), model.layout)


def join(tree: Params, other: Params) -> Params:
    """Put two trees together, such as parts of one; where both have a weight, it is the other's."""
    joined = dict(tree)
    for name, value in other.items():
        joined[name] = join(tree.get(name, {}), value) if isinstance(value, dict) else value
    return joined
