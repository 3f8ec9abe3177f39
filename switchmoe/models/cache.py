"""What generation remembers of the rows so far, in arrays of a fixed size."""

from typing import NamedTuple

import jax.numpy as jnp

from switchmoe.models.config import LMConfig
from switchmoe.models.stack import KeptKeysValues, LayersKeysValues
from switchmoe.nn import KeysValues
from switchmoe.parallel import Layout, constrain
from switchmoe.shapes import Array, Bool, Int


class Cache(NamedTuple):
    """Keys and values of the tokens so far: M places a row, filled from the first on, by all rows alike.

    Attributes:
      layers: the keys and values of each layer, stacked like the layers; one by one, where these are not.
      filled: how many places are taken, the same in every row.
      real_BM: which of them hold a token, and not the padding in front of a shorter row.
      source: what the encoder's tokens offer to each layer, likewise; None without an encoder.
      source_mask_BP: False at the encoder's padding; None where it has none.
    """

    layers: KeptKeysValues
    filled: Int[Array, ""]
    real_BM: Bool[Array, "B M"]
    source: KeptKeysValues | None = None
    source_mask_BP: Bool[Array, "B P"] | None = None

    def take(
        self, mask_BS: Bool[Array, "B S"] | None, ids_BS: Int[Array, "B S"]
    ) -> tuple["Cache", Int[Array, "B S"], tuple[Int[Array, " S"], Int[Array, " M"]]]:
        """Give the next S places to new tokens: the cache, their positions in their rows, and all places."""
        length = ids_BS.shape[1]
        new_BS = jnp.ones(ids_BS.shape, bool) if mask_BS is None else mask_BS
        place_S = self.filled + jnp.arange(length)
        before_B1 = jnp.sum(self.real_BM, axis=1, keepdims=True, dtype=jnp.int32)
        positions_BS = jnp.maximum(before_B1 + jnp.cumsum(new_BS, axis=1, dtype=jnp.int32) - 1, 0)
        taken = self._replace(
            filled=self.filled + length, real_BM=self.real_BM.at[:, place_S].set(new_BS, mode="drop")
        )
        return taken, positions_BS, (place_S, jnp.arange(self.real_BM.shape[1]))

    def seen_by(self, length: int, window: int | None) -> Bool[Array, "B 1 S M"]:
        """Say which places the newest `length` tokens see: real ones up to their own, in the window.

        Padding sees itself, so that no row of the softmax is empty.
        """
        place_M = jnp.arange(self.real_BM.shape[1])
        ahead_SM = place_M[None, :] - (self.filled - length + jnp.arange(length))[:, None]
        seen_SM = ahead_SM <= 0
        if window is not None:
            seen_SM = seen_SM & (ahead_SM > -window)
        return (seen_SM & (self.real_BM[:, None, :] | (ahead_SM == 0)))[:, None]


def empty_cache(config: LMConfig, batch: int, length: int, layout: Layout | None = None) -> Cache:
    """Make a cache without tokens, in the type of the model's activations, split like rows and heads."""
    heads, features = config.num_kv_heads, config.features_per_head

    def of_super_blocks(*stacked: int) -> LayersKeysValues:
        def zeros(dims: str, *shape: int) -> Array:
            shape = (*stacked, batch, heads, *shape)
            return constrain(layout, jnp.zeros(shape, config.compute_dtype), "L" * len(stacked) + dims)

        def pair() -> KeysValues:
            return KeysValues(zeros("BNAS", features, length), zeros("BNSA", length, features))

        return {f"layer_{layer}": pair() for layer in range(config.moe_every)}

    count = config.num_super_blocks
    return Cache(
        layers=of_super_blocks(count)
        if config.scan_layers
        else tuple(of_super_blocks() for _ in range(count)),
        filled=jnp.zeros((), jnp.int32),
        real_BM=jnp.zeros((batch, length), bool),
    )
