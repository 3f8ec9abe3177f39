"""The sums over tokens that losses and metrics are made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.shapes import Array, Float


class MoEAux(NamedTuple):
    """What happened to the tokens of a layer, as float32 sums and counts over unmasked tokens.

    Sums add over groups, micro-batches, devices and evaluation batches; `switchmoe.summarize` makes the
    ratios and losses afterwards. Stacked over layers, every field has a leading L.

    Attributes:
      load_E: choices that name each expert, before anything is dropped.
      kept_E: choices that got a seat at each expert.
      prob_sum_E: sum over tokens of the router's probability for each expert. Carries the gradient of the
        load-balance loss.
      z_sum: sum over tokens of logsumexp(logits) ** 2. Carries the gradient of the z-loss.
      entropy_sum: sum over tokens of the entropy of the router's probabilities, in nats.
      top_prob_sum: sum over tokens of the largest probability.
      dropped: choices that found no seat.
      expected_dropped: choices that would find none if experts were drawn evenly at random. A group with
        n choices is read as n / k tokens, between whole tokens by a straight line. Where full experts pass
        choices on (overflow="next"), those beyond all seats: exact for k = 1, and the least for k > 1.
      tokens: unmasked tokens.
      choices: choices of unmasked tokens: k a token, less those that the router left unused.
      unserved: tokens that no expert read.
      smooth_load_E: sum over tokens of the probability that new noise would send them to each expert, for
        the load loss; `load_E`, without a gradient, where the router has no such noise.
      sequence_balance_sum: sum over sequences of their own load-balance loss.
      sequences: sequences with a token in them.
    """

    load_E: Float[Array, "*L E"]
    kept_E: Float[Array, "*L E"]
    prob_sum_E: Float[Array, "*L E"]
    z_sum: Float[Array, "*L"]
    entropy_sum: Float[Array, "*L"]
    top_prob_sum: Float[Array, "*L"]
    dropped: Float[Array, "*L"]
    expected_dropped: Float[Array, "*L"]
    tokens: Float[Array, "*L"]
    choices: Float[Array, "*L"]
    unserved: Float[Array, "*L"]
    smooth_load_E: Float[Array, "*L E"]
    sequence_balance_sum: Float[Array, "*L"]
    sequences: Float[Array, "*L"]


def add_aux(first: MoEAux, second: MoEAux) -> MoEAux:
    """Count the tokens of two groups, batches or devices as one."""
    return jax.tree.map(jnp.add, first, second)
