"""Routers that send each token to the k experts it scores highest."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Router, Routing, group_keys
from switchmoe.shapes import Array, Bool, Float, Key, ScalarKey


def choose_top_k(
    logits_TE: Float[Array, "*G T E"],
    *,
    k: int = 1,
    renormalize: bool = False,
    mask: Bool[Array, "*G T"] | None = None,
    bias: Float[Array, " E"] | None = None,
) -> Routing:
    """Send each token to the k experts it gives the highest probability, weighted by that probability.

    Softmax comes before the choice; ties go to the lowest index. With `renormalize` a token's k weights are
    divided by their sum (Mixtral). `bias` is added to the probabilities for the choice only and gets no
    gradient. Logits are read as float32, and everything returned is float32.

    Source: Switch Transformers, equations 1-2, https://arxiv.org/abs/2101.03961; Mixtral, section 2.1,
    https://arxiv.org/abs/2401.04088.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    num_experts = logits_TE.shape[-1]
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)  # equation 1
    scores_TE = lax.stop_gradient(probs_TE if bias is None else probs_TE + bias)
    if k == 1:
        expert_TK = jnp.argmax(scores_TE, axis=-1, keepdims=True).astype(jnp.int32)
    else:
        expert_TK = lax.top_k(scores_TE, k)[1]
    # A product with the one-hot choice, not an indexed read, whose gradient would be a scatter.
    one_hot_TKE = jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32)
    weight_TK = jnp.sum(one_hot_TKE * probs_TE[..., None, :], axis=-1)  # equation 2's p_i(x)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(axis=-1, keepdims=True)
    if mask is None:
        mask = jnp.ones(logits_TE.shape[:-1], bool)
    return Routing(expert_TK, weight_TK, logits_TE, probs_TE, mask)


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
    key: ScalarKey | Key[Array, " G"] | None = None,
) -> Float[Array, "G T E"]:
    """Score every expert for each token, in float32 whatever the activations' dtype.

    With `jitter` eps each feature of the router's input, and of nothing else, is multiplied by uniform noise
    in [1 - eps, 1 + eps]: the reading of the paper's text. (Its pseudo-code adds the noise to the logits.)
    The product asks for full float32, since accelerators otherwise round its inputs.

    Source: Switch Transformers, sections 2.4 (selective precision, jitter) and C.
    """
    x_GTD = x_GTD.astype(jnp.float32)
    if jitter > 0 and key is not None:
        keys_G = group_keys(key, x_GTD.shape[0])
        x_GTD *= jax.vmap(
            lambda group_key: jax.random.uniform(
                group_key, x_GTD.shape[1:], minval=1.0 - jitter, maxval=1.0 + jitter
            )
        )(keys_G)
    return jnp.einsum("GTD,DE->GTE", x_GTD, router_DE.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def top_k(config: MoEConfig) -> Router:
    """Send each token to its `config.top_k` most probable experts (see `choose_top_k`)."""
    choose = functools.partial(choose_top_k, k=config.top_k, renormalize=config.renormalize)

    def init(key):
        return init_linear_router(
            key, d_model=config.d_model, num_experts=config.num_experts, init_scale=config.init_scale
        )

    def apply(params, x_GTD, *, key=None, mask=None, bias=None, train=False):
        logits_GTE = score_tokens(params, x_GTD, jitter=config.jitter if train else 0.0, key=key)
        return choose(logits_GTE, mask=mask, bias=bias)

    return Router(init, apply, choose)


def switch(config: MoEConfig) -> Router:
    """Send each token to its single most probable expert, weighted by that probability.

    Source: Switch Transformers, section 2.1, https://arxiv.org/abs/2101.03961.
    """
    if config.top_k != 1:
        raise ValueError(
            f"router='switch' sends a token to one expert, but top_k={config.top_k}; use router='top_k'."
        )
    return top_k(config)
