"""Every router as the contract tests try it: its settings, what is true of it, and its parts called alike."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.routing import ROUTERS, make_router

from . import oracle
from .worlds import make_config

GROUPS, TOKENS, D_MODEL, EXPERTS = 2, 6, 4, 3
MASK = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]], bool)


class Traits(NamedTuple):
    """What the contract has to know of a router beyond its line in ROUTERS.

    Attributes:
      variants: the settings it is tried with.
      scores: "softmax" or "sigmoid" if in evaluation each token takes its best experts by that; else "".
      shares: whether a token's weights add to 1 whatever `renormalize` says.
      sparse: whether `probs_GTE` are the weights at the chosen experts and 0 elsewhere.
      blind: whether it looks at no score, so that no bias moves it and no gradient reaches it.
      scoreless: whether it has no scores [T, E] to choose by.
      draws: whether it draws in training whatever the settings.
      plans: whether in training, and only there, it makes a plan for all tokens of a group.
    """

    variants: tuple[dict, ...] = (dict(), dict(top_k=2))
    scores: str = ""
    shares: bool = False
    sparse: bool = False
    blind: bool = False
    scoreless: bool = False
    draws: bool = False
    plans: bool = False


TWO = dict(top_k=2)
SHARES_OF_TWO = dict(top_k=2, renormalize=True)
# A router that is not here is tried with one expert and with two, and promises nothing out of the ordinary.
TRAITS = {
    "switch": Traits((dict(),), "softmax"),
    "top_k": Traits((TWO, SHARES_OF_TWO), "softmax"),
    "top_k_then_softmax": Traits((TWO,), "softmax", shares=True),
    "gshard": Traits((TWO,), "softmax", shares=True, draws=True),
    "sigmoid": Traits(
        (TWO, dict(top_k=2, renormalize=True, weight_scale=2.5, expert_groups=3, groups_per_token=2)),
        "sigmoid",
    ),
    "noisy_top_k": Traits((TWO,), "softmax", shares=True, sparse=True, draws=True),
    "expert_choice": Traits((TWO,)),
    "soft_moe": Traits((dict(slots_per_expert=2),), scoreless=True),
    "soft": Traits((dict(top_k=EXPERTS),), "softmax"),
    "sinkhorn": Traits((dict(), SHARES_OF_TWO), "softmax", plans=True),
    "base": Traits((dict(),), "sigmoid", plans=True),
    "hash": Traits((TWO,), shares=True, blind=True, scoreless=True),
    "random": Traits((TWO,), shares=True, blind=True, draws=True),
    "balanced": Traits((TWO,), shares=True, blind=True),
}


def traits_of(config):
    return TRAITS.get(config.router, Traits())


def make_cases(wanted=lambda traits: True):
    """(router, settings) of all routers whose traits are wanted."""
    traits = {name: TRAITS.get(name, Traits()) for name in ROUTERS}
    return [(name, options) for name in ROUTERS if wanted(traits[name]) for options in traits[name].variants]


def build(case):
    """The case's config; as many seats in training as in evaluation, and a router with opinions."""
    name, options = case
    return make_config(router=name, init_scale=40.0, capacity_factor=1.0, eval_capacity_factor=1.0, **options)


@functools.cache
def params_of(config):
    with jax.ensure_compile_time_eval():  # also where it is first asked for while tracing
        return make_router(config).init(jax.random.key(3))


def ids_of(x_GTD):
    """A token's id is made of what stands there, so whoever changes the one changes the other."""
    return jnp.round(100 * x_GTD[..., 0].astype(jnp.float32)).astype(jnp.int32)


TRACES = collections.Counter()  # how often `apply` was traced for a config


@functools.partial(jax.jit, static_argnames=("config", "train"))
def _apply(params, x_GTD, key, mask, bias, config, train):
    TRACES[config, train] += 1
    return make_router(config).apply(
        params, x_GTD, key=key, mask=mask, token_ids=ids_of(x_GTD), bias=bias, train=train
    )


def apply(params, x_GTD, config, *, key=None, mask=None, bias=None, train=False):
    """Call the router with everything that any router reads; always a key and a mask, so it compiles once."""
    key = group_keys() if key is None else key
    mask = np.ones(x_GTD.shape[:2], bool) if mask is None else mask
    return _apply(params, x_GTD, key, mask, bias, config, train)


def group_keys(seed=5):
    """A key for each group: without, a router that draws takes a group that stands alone for the first."""
    return jax.random.split(jax.random.key(seed), GROUPS)


def adds_to_one(config):
    return config.renormalize or traits_of(config).shares


def oracle_scores(config, logits_E):
    scores = {"softmax": oracle.softmax, "sigmoid": oracle.sigmoid}[traits_of(config).scores]
    return scores(np.asarray(logits_E, np.float64))


def oracle_weights(config, logits_E, experts):
    """The weights that a token's scores give to these experts, in float64."""
    chosen = oracle_scores(config, logits_E)[list(experts)]
    return config.weight_scale * chosen / (chosen.sum() if adds_to_one(config) else 1.0)
