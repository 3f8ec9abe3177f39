"""A decision and its seats to the sums that losses and metrics are made of."""

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.dispatching.seats import expected_drop_table
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.routing.base import MoEAux, Routing


@jax.jit
def sum_routing(routing: Routing, plan: SlotPlan) -> MoEAux:
    """Count what happened to the unmasked tokens of all groups."""
    num_tokens, k = routing.expert_GTK.shape[-2:]
    num_experts = routing.probs_GTE.shape[-1]
    keep_GT = routing.mask_GT.astype(jnp.float32)

    def total(value_GT):
        return jnp.sum(value_GT * keep_GT)

    chosen_GTE = jax.nn.one_hot(routing.expert_GTK, num_experts).sum(axis=-2)
    log_z_GT = jax.nn.logsumexp(routing.logits_GTE, axis=-1)
    # From the probabilities, since they need not be the softmax of the logits; finite slope at 0.
    log_probs_GTE = jnp.log(jnp.maximum(routing.probs_GTE, jnp.finfo(jnp.float32).tiny))
    entropy_GT = -jnp.sum(routing.probs_GTE * log_probs_GTE, axis=-1)
    # Expert E, a choice that is not used, is no row of one_hot's, so it is in no load.
    load_E = jnp.einsum("GTE,GT->E", chosen_GTE, keep_GT)
    kept_E = jnp.sum(plan.token_GEC < num_tokens, axis=(0, 2)).astype(jnp.float32)
    tokens = jnp.sum(keep_GT)
    floor_N = expected_drop_table(num_tokens, num_experts, k, seats=plan.token_GEC.shape[-1])
    floor_N = jnp.asarray(np.append(floor_N, floor_N[-1]), jnp.float32)
    used_GTK = (routing.expert_GTK < num_experts) & routing.mask_GT[..., None]
    whole_G, rest_G = jnp.divmod(used_GTK.sum(axis=(-2, -1)), k)
    floor_G = floor_N[whole_G] + rest_G / k * (floor_N[whole_G + 1] - floor_N[whole_G])
    choices = load_E.sum()
    return MoEAux(
        load_E=load_E,
        kept_E=kept_E,
        prob_sum_E=jnp.einsum("GTE,GT->E", routing.probs_GTE, keep_GT),
        z_sum=total(jnp.square(log_z_GT)),
        entropy_sum=total(entropy_GT),
        top_prob_sum=total(routing.probs_GTE.max(axis=-1)),
        dropped=choices - kept_E.sum(),
        expected_dropped=jnp.sum(floor_G),
        tokens=tokens,
        choices=choices,
    )
