"""Losses on the router's behaviour, as pure functions of sums over tokens."""

import jax.numpy as jnp

from switchmoe.shapes import Array, Float


def balance_loss(
    load_E: Float[Array, "*L E"],
    prob_sum_E: Float[Array, "*L E"],
    tokens: Float[Array, "*L"],
    choices: Float[Array, "*L"],
) -> Float[Array, "*L"]:
    """Push tokens evenly over the experts of a layer: E * sum_e f_e P_e.

    f_e is the share of choices that name expert e, P_e its mean probability. The value is 1.0 when both are
    even, for every number of choices k, since f is a share of choices; an implementation that divides by
    tokens instead gives k (Hugging Face's Mixtral, flaxformer). The gradient reaches the router through P
    alone. One value a layer: layers are never merged, so they can't cancel.

    Source: Switch Transformers, equations 4-6, https://arxiv.org/abs/2101.03961.
    """
    num_experts = load_E.shape[-1]
    share_E = load_E / jnp.maximum(choices, 1)[..., None]  # equation 5
    mean_prob_E = prob_sum_E / jnp.maximum(tokens, 1)[..., None]  # equation 6
    return num_experts * jnp.sum(share_E * mean_prob_E, axis=-1)  # equation 4, without alpha


def z_loss(z_sum: Float[Array, "*L"], tokens: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Keep the scores a token gets small: the mean over tokens of logsumexp(logits) ** 2.

    Source: ST-MoE, equation 5, https://arxiv.org/abs/2202.08906.
    """
    return z_sum / jnp.maximum(tokens, 1)


def importance_loss(probs_TE: Float[Array, "*T E"]) -> Float[Array, ""]:
    """Push the experts' total probability over all tokens to be even: its squared coefficient of variation.

    The variance is the population's (divided by E). Zero when every expert has the same total.

    Source: Outrageously Large Neural Networks, section 4, https://arxiv.org/abs/1701.06538.
    """
    importance_E = probs_TE.reshape(-1, probs_TE.shape[-1]).sum(axis=0)
    return jnp.var(importance_E) / jnp.square(jnp.mean(importance_E))
