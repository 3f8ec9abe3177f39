"""Keys and values that attention has computed, kept so that a new token does not compute them again."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from switchmoe.shapes import Array, Float, Int


class KeysValues(NamedTuple):
    """What the tokens that can be attended to offer to one layer: N heads of A features at M places.

    Both lie as attention multiplies by them, so that what is kept is not turned around for each new token.
    """

    k_BNAM: Float[Array, "B N A M"]
    v_BNMA: Float[Array, "B N M A"]


class LayerCache(NamedTuple):
    """The keys and values of a layer's own tokens, alone or among those of the layers it is stacked with.

    Attributes:
      kept: with room for M tokens a row; of all layers of a stack they have an L in front.
      slot: the place of the first token of this call; its others follow.
      layer: which layer of the stack is meant; None where there is no stack.
    """

    kept: KeysValues
    slot: Int[Array, ""] | int
    layer: Int[Array, ""] | int | None = None

    def write(self, new: KeysValues) -> "LayerCache":
        """Put the new tokens' keys and values into their places, where there must be room for them."""

        def put(kept: Array, new: Array, *place: Int[Array, ""] | int) -> Array:
            new = new.astype(kept.dtype)
            if self.layer is None:
                return lax.dynamic_update_slice(kept, new, (0, 0, *place))
            return lax.dynamic_update_slice(kept, new[None], (self.layer, 0, 0, *place))

        k_BNAM = put(self.kept.k_BNAM, new.k_BNAM, 0, self.slot)
        return self._replace(kept=KeysValues(k_BNAM, put(self.kept.v_BNMA, new.v_BNMA, self.slot, 0)))

    def read(self) -> KeysValues:
        """Give the layer's keys and values at all places, filled or not."""
        if self.layer is None:
            return self.kept
        return KeysValues(*(jnp.take(stacked, self.layer, axis=0) for stacked in self.kept))
