"""Layers on layers: super-blocks, scanned where they are stacked, and the norm behind the last one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.layer import Trace
from switchmoe.models.config import LMConfig
from switchmoe.models.super_block import SuperBlock
from switchmoe.nn import KeysValues, LayerCache, RelativePositions, RMSNorm, rematerialize
from switchmoe.parallel import Layout, gather_weights
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Float, Int, ScalarKey, named_key

# The keys and values of a super-block's layers, by their names.
LayersKeysValues = dict[str, KeysValues]
# Of all super-blocks, stacked in a first dimension like these; or, where these are not stacked, of each.
KeptKeysValues = LayersKeysValues | tuple[LayersKeysValues, ...]


class StackOutput(NamedTuple):
    """What a stack makes of its tokens.

    Attributes:
      x_BSD: the tokens, normalised.
      aux: the sums of the sparse layers, with a leading L; None without sparse layers.
      trace: where the tokens went in each of them, None unless asked for.
      cache: the keys and values of all layers, None unless some were given.
    """

    x_BSD: Float[Array, "B S D"]
    aux: MoEAux | None
    trace: Trace | None
    cache: KeptKeysValues | None


class SeparateBlocks(nnx.Module):
    """Super-blocks that are not stacked: `block_0`, `block_1`, ..."""

    block_0: SuperBlock

    def __init__(self, blocks: Sequence[SuperBlock]) -> None:
        for index, block in enumerate(blocks):
            setattr(self, f"block_{index}", block)


class Stack(nnx.Module):
    """The layers of an encoder or a decoder, the norm behind them, and what knows about distances.

    `blocks` is one `SuperBlock` whose parameters carry a leading dimension, one entry a super-block, which
    the forward pass scans over; or, without `scan_layers`, one that holds them one by one, as `block_0`,
    `block_1`, ... Parameters beside those: `final_norm`, and `positions` where these are relative.
    """

    # Only with relative positions.
    positions: RelativePositions

    def __init__(self, config: LMConfig, key: ScalarKey, *, cross: bool, causal: bool) -> None:
        self.config = config
        self.blocks = _make_super_blocks(config, cross, named_key(key, "blocks"))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=config.param_dtype)
        if config.positions == "relative":
            self.positions = RelativePositions(
                config.num_heads,
                buckets=config.relative_buckets,
                furthest=config.relative_distance,
                bidirectional=not causal,
                dtype=config.param_dtype,
                rngs=nnx.Rngs(params=named_key(key, "positions")),
            )

    def run(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        places: tuple[Int[Array, " S"], Int[Array, " M"]],
        replay: Int[Array, "L B S K"] | None = None,
        key: ScalarKey | None = None,
        cache: KeptKeysValues | None = None,
        slot: Int[Array, ""] | int = 0,
        source: Float[Array, "B P D"] | KeptKeysValues | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> StackOutput:
        """Pass the tokens through all layers; `options` are those of `Block`.

        `places` are those the tokens stand at, and those they can look at. With a `cache` the tokens' keys
        and values go into its places from `slot` on.
        """
        config = self.config
        if config.positions == "relative":
            options["bias_HSM"] = self.positions(*places)
        graphdef = self._graph_of_a_block()

        def step(carried, block):
            x_BSD, cache = carried
            params, index, replay_BSK, offered = block
            if layout is not None:
                params = gather_weights(layout, params, config.compute_dtype)
            inside = None
            if cache is not None:
                own, layer = (cache[index], None) if isinstance(cache, tuple) else (cache, index)
                inside = {name: LayerCache(pair, slot, layer) for name, pair in own.items()}
            x_BSD, aux, where, inside = nnx.merge(graphdef, params)(
                x_BSD,
                replay_BSK=replay_BSK,
                key=None if key is None else jax.random.fold_in(named_key(key, "blocks"), index),
                cache=inside,
                source=source[index] if isinstance(source, tuple) else source if offered is None else offered,
                layout=layout,
                **options,
            )
            if inside is not None:
                own = {name: layer.kept for name, layer in inside.items()}
                cache = (*cache[:index], own, *cache[index + 1 :]) if isinstance(cache, tuple) else own
            return (x_BSD, cache), (aux, where)

        if cache is None:  # else nothing is kept for a backward pass
            gathered_over = () if layout is None else layout.used(layout.rules.model)
            step = rematerialize(step, config.remat, gathered_over=gathered_over)
        by_block = (replay, source if isinstance(source, dict) else None)
        (x_BSD, cache), (aux, where) = self._walk(step, (x_BSD, cache), by_block)
        return StackOutput(self.final_norm(x_BSD), aux, where, cache)

    def _walk(self, step: Callable[..., Any], carried: Any, by_block: Any) -> tuple[Any, Any]:
        """Take `step(carried, (weights, index, *by_block))` for each super-block, stacking what it says."""
        count = self.config.num_super_blocks
        if isinstance(self.blocks, SuperBlock):
            stacked = (nnx.state(self.blocks), jnp.arange(count), *by_block)
            return jax.lax.scan(step, carried, stacked)
        said = []
        for index in range(count):
            own = jax.tree.map(lambda a, index=index: a[index], by_block)
            weights = nnx.state(getattr(self.blocks, f"block_{index}"))
            carried, result = step(carried, (weights, index, *own))
            said.append(result)
        return carried, jax.tree.map(lambda *parts: jnp.stack(parts), *said)

    def offer(self, source_BPD: Float[Array, "B P D"], layout: Layout | None = None) -> KeptKeysValues:
        """Compute once what an encoder's tokens offer to every layer of this decoder."""
        graphdef = self._graph_of_a_block()

        def step(nothing, block):
            params = block[0]
            if layout is not None:
                params = gather_weights(layout, params, self.config.compute_dtype)
            merged = nnx.merge(graphdef, params)
            layers = {name: getattr(merged, name).cross_attention for name in merged.names}
            return nothing, {
                name: layer.keys_values(source_BPD, layout=layout) for name, layer in layers.items()
            }

        if isinstance(self.blocks, SuperBlock):
            return self._walk(step, None, ())[1]
        blocks = (getattr(self.blocks, f"block_{index}") for index in range(self.config.num_super_blocks))
        return tuple(step(None, (nnx.state(block),))[1] for block in blocks)

    def _graph_of_a_block(self) -> Any:
        blocks = self.blocks
        return nnx.graphdef(blocks if isinstance(blocks, SuperBlock) else blocks.block_0)


def _make_super_blocks(config: LMConfig, cross: bool, key: ScalarKey) -> SuperBlock | SeparateBlocks:
    """Draw every super-block from the key of its index, and stack the parameters in a first dimension."""

    def draw(block_key: ScalarKey) -> SuperBlock:
        return SuperBlock(config, cross=cross, rngs=nnx.Rngs(params=block_key))

    if not config.scan_layers:
        return SeparateBlocks([draw(jax.random.fold_in(key, i)) for i in range(config.num_super_blocks)])
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(config.num_super_blocks))
    return nnx.vmap(draw)(keys)
