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


def importance_loss(prob_sum_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Push the experts' total probability over all tokens to be even: its squared coefficient of variation.

    Zero when every expert has the same total. With "noisy_top_k", whose probabilities are 0 outside of a
    token's k experts, it is the paper's; with other routers it is V-MoE's (arXiv 2106.05974, section A.2).

    Source: Outrageously Large Neural Networks, equations 6-7, https://arxiv.org/abs/1701.06538.
    """
    return _squared_variation(prob_sum_E)


def load_loss(smooth_load_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Push the number of tokens at each expert to be even, by a smooth stand-in for that number.

    The squared coefficient of variation of the expected load under new noise; needs a router that draws
    some, "noisy_top_k".

    Source: Outrageously Large Neural Networks, equations 8-11, https://arxiv.org/abs/1701.06538.
    """
    return _squared_variation(smooth_load_E)


def sequence_balance_loss(
    sequence_balance_sum: Float[Array, "*L"], sequences: Float[Array, "*L"]
) -> Float[Array, "*L"]:
    """Push the tokens of each sequence evenly over the experts: the mean of the sequences' `balance_loss`.

    1.0 when every sequence is spread evenly.

    Source: DeepSeek-V3, equations 17-20, https://arxiv.org/abs/2412.19437.
    """
    return sequence_balance_sum / jnp.maximum(sequences, 1)


def _squared_variation(total_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Variance (the population's, divided by E) over the squared mean; 0 where there is nothing at all."""
    mean = total_E.mean(axis=-1)
    # Divided by 1 and not by a tiny number where there is nothing: the slope of that would be a NaN.
    return total_E.var(axis=-1) / jnp.square(jnp.where(mean > 0, mean, 1.0))
