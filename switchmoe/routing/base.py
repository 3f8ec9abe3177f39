"""What a router decides about each token, and the sums that losses and metrics are made of."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey, named_key

RouterParams = Any


class Routing(NamedTuple):
    """Each token's experts, best first, and the weight of each expert's output in the token's result.

    Everything is float32 (experts int32), whatever the activations are. Fields may carry leading group
    dimensions. A masked token has experts and weights too; whoever uses them must look at the mask.

    A router may leave a choice unused (GShard's second expert). Such a choice names expert E and has weight
    0: as an empty seat names token T, so that it takes no seat and counts nowhere without being looked for.

    Attributes:
      expert_GTK: the chosen experts, in [0, E); E where the choice is not used.
      weight_GTK: the weight of each choice.
      logits_GTE: the router's scores.
      probs_GTE: the scores as shares that add to 1: their softmax, unless the router says otherwise.
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
        (`group_keys`), and makes no noise unless `train`; `mask` is False at padding; `bias_E` is added to
        the scores for the choice only.
      choose: `(logits_TE, *, mask, bias) -> Routing`, the part of `apply` after the scores, as it is in
        evaluation.
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
      expected_dropped: choices that would find none if experts were drawn evenly at random. A group with
        n choices is read as n / k tokens, between whole tokens by a straight line.
      tokens: unmasked tokens.
      choices: choices of unmasked tokens: k a token, less those that the router left unused.
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


def draw_noise(
    key: ScalarKey | Key[Array, " G"],
    name: str,
    shape: tuple[int, ...],
    draw: Callable[..., Array] = jax.random.uniform,
) -> Float[Array, "*G T E"]:
    """Draw noise of `shape` [*G, T, E] called `name`, each group's from the key of that group.

    `key` is one key, or one a group. Two names give independent noise.
    """
    keys_G = group_keys(key, math.prod(shape[:-2]))
    return jax.vmap(lambda group_key: draw(named_key(group_key, name), shape[-2:]))(keys_G).reshape(shape)


ROUTER_SETTINGS = (
    "renormalize",
    "jitter",
    "input_dropout",
    "exploration",
    "weight_scale",
    "expert_groups",
    "groups_per_token",
)


def refuse_unread(config: MoEConfig, *read: str) -> None:
    """Raise a ValueError if the config sets a router's setting other than those that its router reads."""
    defaults = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    for name in ROUTER_SETTINGS:
        value = getattr(config, name)
        if name not in read and value != defaults[name]:
            raise ValueError(
                f"router={config.router!r} does not read {name}, but {name}={value!r}; "
                f"leave it at {defaults[name]!r}, or choose another router."
            )


def require_key(config: MoEConfig, key: ScalarKey | Key[Array, " G"] | None, what: str):
    """Return the key, or raise a ValueError saying that this router's training needs one."""
    if key is None:
        raise ValueError(f"router={config.router!r} {what} in training, so it needs a key; pass key=.")
    return key
