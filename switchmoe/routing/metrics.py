"""Ratios, losses and metrics, made from a layer's sums once everything has been added up."""

import jax
import jax.numpy as jnp

from switchmoe.config import LOSS_COEFFICIENTS, MoEConfig
from switchmoe.routing.aux_sums import MoEAux
from switchmoe.routing.losses import balance_loss, importance_loss, load_loss, sequence_balance_loss, z_loss
from switchmoe.shapes import Array, Float


def summarize(aux: MoEAux) -> dict[str, Array]:
    """Turn sums over tokens into losses and metrics by name.

    Of one layer, or of several stacked along a leading L. The losses (`balance_loss`,
    `sequence_balance_loss`, `importance_loss`, `load_loss`, `z_loss`; see `switchmoe.routing.losses`) are
    computed per layer and then summed, as Switch Transformers adds its own. The others are means over layers:
    `dropped_fraction` beside `dropped_floor` (what even random routing would drop), `unserved_fraction` (of
    tokens, those that no expert read), `max_vio` (largest load over mean load, minus 1), `router_entropy` in
    nats, `top_prob`; `dead_experts` counts experts without a token. `load_fraction` keeps its shape [..., E].
    Metrics carry no gradient.
    """
    aux_const = jax.lax.stop_gradient(aux)
    tokens = jnp.maximum(aux_const.tokens, 1)
    choices = jnp.maximum(aux_const.choices, 1)
    load_E = aux_const.load_E
    mean_load = jnp.maximum(load_E.mean(axis=-1), 1e-9)
    return {
        "balance_loss": balance_loss(load_E, aux.prob_sum_E, aux.tokens, aux.choices).sum(),
        "sequence_balance_loss": sequence_balance_loss(aux.sequence_balance_sum, aux.sequences).sum(),
        "importance_loss": importance_loss(aux.prob_sum_E).sum(),
        "load_loss": load_loss(aux.smooth_load_E).sum(),
        "z_loss": z_loss(aux.z_sum, aux.tokens).sum(),
        "dropped_fraction": jnp.mean(aux_const.dropped / choices),
        "dropped_floor": jnp.mean(aux_const.expected_dropped / choices),
        "unserved_fraction": jnp.mean(aux_const.unserved / tokens),
        "max_vio": jnp.mean(jnp.maximum(load_E.max(axis=-1) / mean_load - 1, 0)),  # 0 without a token
        "router_entropy": jnp.mean(aux_const.entropy_sum / tokens),
        "top_prob": jnp.mean(aux_const.top_prob_sum / tokens),
        "dead_experts": jnp.sum(load_E == 0),
        "load_fraction": load_E / choices[..., None],
    }


def aux_loss(aux: MoEAux, config: MoEConfig) -> Float[Array, ""]:
    """Add the losses on the router, each summed over layers and weighted as the config says."""
    metrics = summarize(aux)
    # A loss that is turned off is left out, so that its gradient costs nothing and can't be a NaN.
    total = jnp.float32(0)
    for name in LOSS_COEFFICIENTS:
        coefficient = getattr(config, name)
        if coefficient:
            total = total + coefficient * metrics[name.replace("_coef", "_loss")]
    return total
