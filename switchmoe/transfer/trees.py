"""A model's weights as nested dictionaries, and its layers in another arrangement of super-blocks."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.models import LMConfig, TransformerLM
from switchmoe.nn import BalanceBias
from switchmoe.shapes import ScalarKey

Params = dict[str, Any]


def params_of(model: TransformerLM) -> Params:
    """Take the weights out of a model, balance biases among them, as `train` keeps them too."""
    return nnx.to_pure_dict(nnx.split(model, (nnx.Param, BalanceBias), ...)[1])


def with_params(config: LMConfig, params: Params) -> TransformerLM:
    """Make a model of its shape and its weights, ready to be called."""
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    graph, _, _ = nnx.split(model, (nnx.Param, BalanceBias), ...)
    return nnx.merge(graph, params)


def draw_params(config: LMConfig, *, key: ScalarKey) -> Params:
    """Draw the weights of a new model."""
    return jax.jit(lambda key: params_of(TransformerLM(config, rngs=nnx.Rngs(params=key))))(key)


def refuse_separate_blocks(config: LMConfig) -> None:
    """Raise a ValueError for a model whose super-blocks are not stacked: what follows counts on that."""
    if not config.scan_layers:
        raise ValueError(
            "the model's layers are separate (scan_layers=False), which is for generating; take the model "
            "from before it was unrolled."
        )


def stacks(params: Params, config: LMConfig) -> Iterator[tuple[Params, LMConfig]]:
    """Give the parts of a model that have layers, each with the config of its own: encoder, then decoder."""
    if config.encoder_layers:
        yield params["encoder"], config.encoder
    yield params, config


def replace_stacks(params: Params, blocks: list[Params]) -> Params:
    """Put other `blocks` into the parts of a model that `stacks` gives, in its order; the rest stays."""
    replaced = {**params, "blocks": blocks[-1]}
    if len(blocks) > 1:
        replaced["encoder"] = {**params["encoder"], "blocks": blocks[0]}
    return replaced


def rearrange_layers(blocks: Params, every: int, wanted: int) -> Params:
    """Sort the layers of a stack into super-blocks of `wanted` layers instead of `every`, in the same order.

    Raises:
      ValueError: the number of layers is no multiple of `wanted`.
    """
    if wanted == every:
        return blocks
    count = every * len(jax.tree.leaves(blocks)[0])
    if count % wanted:
        raise ValueError(
            f"there are {count} layers, no multiple of moe_every={wanted}, the layers of a super-block; "
            "choose another."
        )

    def layer(number: int) -> Params:
        block, place = divmod(number, every)
        return jax.tree.map(lambda a: a[block], blocks[f"layer_{place}"])

    return {
        f"layer_{place}": jax.tree.map(
            lambda *a: jnp.stack(a), *(layer(number) for number in range(place, count, wanted))
        )
        for place in range(wanted)
    }
