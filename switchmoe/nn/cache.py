"""Keys and values that attention has computed, kept so that a new token does not compute them again."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from switchmoe.shapes import Array, Float, Int


class KeysValues(NamedTuple):
    """What the tokens that can be attended to offer to one layer: N heads of A features at M places."""

    k_BMNA: Float[Array, "B M N A"]
    v_BMNA: Float[Array, "B M N A"]


class LayerCache(NamedTuple):
    """The keys and values of a layer's own tokens, among those of the layers it is stacked with.

    Attributes:
      k_LBMNA, v_LBMNA: of all layers of the stack, with room for M tokens a row.
      layer: which of them is meant.
      slot: the place of the first token of this call; its others follow.
    """

    k_LBMNA: Float[Array, "L B M N A"]
    v_LBMNA: Float[Array, "L B M N A"]
    layer: Int[Array, ""] | int
    slot: Int[Array, ""] | int

    def write(self, new: KeysValues) -> "LayerCache":
        """Put the new tokens' keys and values into their places, where there must be room for them."""
        at = (self.layer, 0, self.slot, 0, 0)
        return self._replace(
            k_LBMNA=lax.dynamic_update_slice(self.k_LBMNA, new.k_BMNA[None].astype(self.k_LBMNA.dtype), at),
            v_LBMNA=lax.dynamic_update_slice(self.v_LBMNA, new.v_BMNA[None].astype(self.v_LBMNA.dtype), at),
        )

    def read(self) -> KeysValues:
        """Give the layer's keys and values at all places, filled or not."""
        return KeysValues(*(jnp.take(a, self.layer, axis=0) for a in (self.k_LBMNA, self.v_LBMNA)))
