"""What routers with one weight [D, E] share: scores, the choice of the best k, and the frame around both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, draw_noise, group_keys, require_key
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey


def init_linear_router(key: ScalarKey, *, d_model: int, num_experts: int, init_scale: float = 0.1):
    """Draw the router's float32 weight [D, E]: truncated normal with deviation sqrt(init_scale / D).

    Source: Switch Transformers, section 2.4, https://arxiv.org/abs/2101.03961.
    """
    init = jax.nn.initializers.variance_scaling(init_scale, "fan_in", "truncated_normal")
    return init(key, (d_model, num_experts), jnp.float32)


def score_tokens(
    router_DE: Float[Array, "D E"],
    x_GTD: Float[Array, "G T D"],
    *,
    jitter: float = 0.0,
    dropout: float = 0.0,
    key: ScalarKey | Key[Array, " G"] | None = None,
) -> Float[Array, "G T E"]:
    """Score every expert for each token, in float32 whatever the activations' dtype.

    With `jitter` eps each feature of the router's input, and of nothing else, is multiplied by uniform noise
    in [1 - eps, 1 + eps]: the reading of the paper's text. (Its pseudo-code adds the noise to the logits.)
    With `dropout` each feature of that input becomes 0 with that probability, or grows by
    1 / (1 - dropout). The product asks for full float32, since accelerators otherwise round its inputs.

    Source: Switch Transformers, sections 2.4 (selective precision) and C (jitter, input dropout).
    """
    x_GTD = x_GTD.astype(jnp.float32)
    if jitter > 0 and key is not None:
        keys_G = group_keys(key, x_GTD.shape[0])
        x_GTD *= jax.vmap(
            lambda group_key: jax.random.uniform(
                group_key, x_GTD.shape[1:], minval=1.0 - jitter, maxval=1.0 + jitter
            )
        )(keys_G)
    if dropout > 0 and key is not None:
        stays_GTD = draw_noise(key, "input_dropout", x_GTD.shape) >= dropout
        x_GTD = jnp.where(stays_GTD, x_GTD / (1.0 - dropout), 0.0)
    return jnp.einsum("GTD,DE->GTE", x_GTD, router_DE.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def pick_experts(scores_TE: Float[Array, "*G T E"], k: int) -> Int[Array, "*G T K"]:
    """Name each token's k best experts, best first; ties go to the lowest index; no gradient."""
    scores_TE = lax.stop_gradient(scores_TE)
    if k == 1:
        return jnp.argmax(scores_TE, axis=-1, keepdims=True).astype(jnp.int32)
    return lax.top_k(scores_TE, k)[1]


def read_chosen(values_TE: Float[Array, "*G T E"], expert_TK: Int[Array, "*G T K"]):
    """Read each token's values at its chosen experts: [*G, T, K], 0 where the choice is expert E."""
    # A product with the one-hot choice, not an indexed read, whose gradient would be a scatter.
    one_hot_TKE = jax.nn.one_hot(expert_TK, values_TE.shape[-1], dtype=jnp.float32)
    return jnp.sum(one_hot_TKE * values_TE[..., None, :], axis=-1)


def all_real(logits_TE: Float[Array, "*G T E"], mask: Bool[Array, "*G T"] | None) -> Bool[Array, "*G T"]:
    """Return the mask, or one that calls every position a token."""
    return jnp.ones(logits_TE.shape[:-1], bool) if mask is None else mask


def renormalize_weights(weight_TK: Float[Array, "*G T K"]) -> Float[Array, "*G T K"]:
    """Divide a token's weights by their sum; a token without any keeps its zeros."""
    return weight_TK / jnp.maximum(weight_TK.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def linear_router(
    config: MoEConfig,
    decide: Callable[..., Routing],
    weigh: Callable[..., Array],
    *,
    needs_key_to: str = "",
) -> Router:
    """Build a router that scores each token with one matrix and leaves the decision to `decide`.

    `decide(logits_TE, *, key, mask, bias)` sees a key in training alone. If it can't do without one there,
    `needs_key_to` says what for, in words that follow the router's name. `weigh` is the router's own.
    """

    def init(key):
        return init_linear_router(
            key, d_model=config.d_model, num_experts=config.num_experts, init_scale=config.init_scale
        )

    def choose(logits_TE, *, mask=None, bias=None):
        return decide(logits_TE, key=None, mask=mask, bias=bias)

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        key = key if train else None
        if train and needs_key_to:
            require_key(config, key, needs_key_to)
        logits_GTE = score_tokens(params, x_GTD, jitter=config.jitter, dropout=config.input_dropout, key=key)
        return decide(logits_GTE, key=key, mask=mask, bias=bias)

    return Router(init, apply, choose, weigh)
