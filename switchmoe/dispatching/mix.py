"""Fill every seat with a mixture of all tokens, and give every token a mixture of all seats: Soft MoE.

Source: From Sparse to Soft Mixtures of Experts, section 2.1, https://arxiv.org/abs/2308.00951.
"""

import jax.numpy as jnp

from switchmoe.routing.base import SoftMix
from switchmoe.shapes import Array, Float


def mix_into_seats(x_GTD: Float[Array, "G T D"], mix: SoftMix) -> Float[Array, "E G C D"]:
    """Put into each seat the average of a group's tokens, weighted by the seat's own shares of them."""
    return jnp.einsum("GTEC,GTD->EGCD", mix.dispatch_GTEC.astype(x_GTD.dtype), x_GTD)


def mix_out_of_seats(y_EGCD: Float[Array, "E G C D"], mix: SoftMix) -> Float[Array, "G T D"]:
    """Give each token the average of what came out of its group's seats, weighted by its shares of them."""
    return jnp.einsum("GTEC,EGCD->GTD", mix.combine_GTEC.astype(y_EGCD.dtype), y_EGCD)
