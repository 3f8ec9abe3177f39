"""What a router decides about each token, and the sums that losses and metrics are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey

RouterParams = Any


class Routing(NamedTuple):
    """Each token's experts, best first, and the weight of each expert's output in the token's result.

    Everything is float32 (experts int32), whatever the activations are. Fields may carry leading group
    dimensions. A masked token has experts and weights too; whoever uses them must look at the mask.

    Attributes:
      expert_GTK: the chosen experts, in [0, E).
      weight_GTK: the weight of each choice.
      logits_GTE: the router's scores.
      probs_GTE: softmax of the scores.
      mask_GT: False where the position is padding.
    """

    expert_GTK: Int[Array, "*G T K"]
    weight_GTK: Float[Array, "*G T K"]
    logits_GTE: Float[Array, "*G T E"]
    probs_GTE: Float[Array, "*G T E"]
    mask_GT: Bool[Array, "*G T"]


class Router(NamedTuple):
    """Three pure functions that send tokens to experts.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, x_GTD, *, key, mask, bias, train) -> Routing`. `key` is one key, or one a group
        (`group_keys`); `mask` is False at padding; `bias_E` is added to the scores for the choice only.
      choose: `(logits_TE, *, mask, bias) -> Routing`, the part of `apply` after the scores.
    """

    init: Callable[..., RouterParams]
    apply: Callable[..., Routing]
    choose: Callable[..., Routing]


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
      expected_dropped: choices that would find none if experts were drawn evenly at random.
      tokens: unmasked tokens.
      choices: unmasked tokens times k.
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


def add_aux(first: MoEAux, second: MoEAux) -> MoEAux:
    """Count the tokens of two groups, batches or devices as one."""
    return jax.tree.map(jnp.add, first, second)


def group_keys(key: ScalarKey | Key[Array, " G"], num_groups: int, first_group: Int[Array, ""] | int = 0):
    """Give each group its own key, derived from the group's index in the whole batch.

    The noise a token meets then does not depend on how groups are spread over devices. A `key` that already
    has one entry a group is returned as it is.
    """
    if key.ndim == 1:
        return key
    return jax.vmap(lambda group: jax.random.fold_in(key, group))(first_group + jnp.arange(num_groups))
