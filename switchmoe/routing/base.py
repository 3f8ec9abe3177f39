"""What a router is and what it decides about each token, in its three forms."""

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
      smooth_load_GTE: the probability that noise drawn anew would send the token to each expert, which has a
        gradient; None where the router has no such noise.
    """

    expert_GTK: Int[Array, "*G T K"]
    weight_GTK: Float[Array, "*G T K"]
    logits_GTE: Float[Array, "*G T E"]
    probs_GTE: Float[Array, "*G T E"]
    mask_GT: Bool[Array, "*G T"]
    smooth_load_GTE: Float[Array, "*G T E"] | None = None


class ExpertChoice(NamedTuple):
    """Each expert's tokens, when experts choose tokens and not tokens experts. Everything is float32.

    An empty seat names token T and weighs 0. A token may sit at any number of experts, or at none; a masked
    one sits nowhere.

    Attributes:
      token_GEC: the tokens each expert chose, best first.
      weight_GEC: the weight of that seat's output in its token's result.
      logits_GTE: the router's scores.
      probs_GTE: the scores as shares that add to 1 over a token's experts.
      mask_GT: False where the position is padding.
    """

    token_GEC: Int[Array, "*G E C"]
    weight_GEC: Float[Array, "*G E C"]
    logits_GTE: Float[Array, "*G T E"]
    probs_GTE: Float[Array, "*G T E"]
    mask_GT: Bool[Array, "*G T"]


class SoftMix(NamedTuple):
    """How much of each token every seat holds, and of each seat every token gets back. All float32.

    Attributes:
      dispatch_GTEC: shares of the tokens in a seat's mixture; they add to 1 over tokens.
      combine_GTEC: shares of the seats in a token's result; they add to 1 over experts and seats.
      logits_GTE: the router's scores for each expert: logsumexp over its seats.
      probs_GTE: `combine_GTEC` added up over an expert's seats.
      mask_GT: False where the position is padding, which has 0 in both tables.
    """

    dispatch_GTEC: Float[Array, "*G T E C"]
    combine_GTEC: Float[Array, "*G T E C"]
    logits_GTE: Float[Array, "*G T E"]
    probs_GTE: Float[Array, "*G T E"]
    mask_GT: Bool[Array, "*G T"]


Decision = Routing | ExpertChoice | SoftMix


class Router(NamedTuple):
    """Four pure functions that send tokens to experts.

    Attributes:
      init: `(key) -> params`, any pytree of float32 arrays.
      apply: `(params, x_GTD, *, key, mask, token_ids, bias, train) -> decision`. `key` is one key, or one a
        group (`group_keys`), and makes no noise unless `train`; `mask` is False at padding; `token_ids` are
        for routers that look at them; `bias_E` is added to the scores for the choice only.
      choose: `(logits_TE, *, mask, bias) -> decision`, the part of `apply` after the scores, as it is in
        evaluation. A router that has no scores [T, E] says so in a ValueError.
      weigh: `(logits_TE, expert_TK) -> weight_TK`, the weights that a token's scores give to experts which
        something else chose; expert E, a choice that is not used, gets 0. None for a router whose tokens do
        not choose experts.
      leak: in a few words, how a later token changes what an earlier one gets; "" if it can't. A causal model
        refuses a router that leaks.
    """

    init: Callable[..., RouterParams]
    apply: Callable[..., Decision]
    choose: Callable[..., Decision]
    weigh: Callable[..., Array] | None = None
    leak: str = ""


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
    "slots_per_expert",
    "overflow",
    "load_coef",
    "bias_step",
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
