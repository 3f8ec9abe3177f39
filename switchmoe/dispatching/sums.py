"""A decision and its plan to the sums that losses and metrics are made of."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from switchmoe.dispatching.chance import expected_drop_table, padded_drop_table
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.routing.aux_sums import MoEAux
from switchmoe.routing.base import Decision, ExpertChoice, Routing, SoftMix
from switchmoe.routing.losses import balance_loss
from switchmoe.shapes import Array, Bool, Float


@partial(jax.jit, static_argnames=("sequences_per_group", "next_choice", "seats_N"))
def sum_routing(
    decision: Decision,
    plan: SlotPlan | SortPlan | SoftMix,
    *,
    sequences_per_group: int = 1,
    next_choice: bool = False,
    seats_N: tuple[int, ...] | None = None,
) -> MoEAux:
    """Count what happened to the unmasked tokens of all groups.

    `plan` is what was made of the decision; with `next_choice` it was made of the choices that
    `take_next_choice` put in place of the full experts', and `decision` still holds the first wishes, which
    are the load. A group's tokens are those of `sequences_per_group` sequences; `seats_N` says how many seats
    an expert has for how many real tokens, where padding brings none.
    """
    keep_GT = decision.mask_GT.astype(jnp.float32)

    def total(value_GT):
        return jnp.sum(value_GT * keep_GT)

    log_z_GT = jax.nn.logsumexp(decision.logits_GTE, axis=-1)
    # From the probabilities, since they need not be the softmax of the logits; finite slope at 0.
    log_probs_GTE = jnp.log(jnp.maximum(decision.probs_GTE, jnp.finfo(jnp.float32).tiny))
    entropy_GT = -jnp.sum(decision.probs_GTE * log_probs_GTE, axis=-1)

    load_GTE = lax.stop_gradient(_count_choices(decision)) * keep_GT[..., None]
    prob_GTE = decision.probs_GTE * keep_GT[..., None]
    load_E, tokens = load_GTE.sum(axis=(0, 1)), jnp.sum(keep_GT)
    smooth_load_E = load_E
    if isinstance(decision, Routing) and decision.smooth_load_GTE is not None:
        smooth_load_E = jnp.einsum("GTE,GT->E", decision.smooth_load_GTE, keep_GT)

    kept_E, served_GT = _count_kept(decision, plan, load_GTE)
    expected_dropped = jnp.float32(0)
    if isinstance(decision, Routing) and isinstance(plan, SlotPlan):
        expected_dropped = _drop_by_chance(decision, plan, next_choice, seats_N)

    def by_sequence(value_GT):
        return value_GT.reshape(value_GT.shape[0], sequences_per_group, -1, *value_GT.shape[2:]).sum(axis=2)

    tokens_GR, load_GRE = by_sequence(keep_GT), by_sequence(load_GTE)
    loss_GR = balance_loss(load_GRE, by_sequence(prob_GTE), tokens_GR, load_GRE.sum(axis=-1))
    choices = load_E.sum()
    return MoEAux(
        load_E=load_E,
        kept_E=kept_E,
        prob_sum_E=prob_GTE.sum(axis=(0, 1)),
        z_sum=total(jnp.square(log_z_GT)),
        entropy_sum=total(entropy_GT),
        top_prob_sum=total(decision.probs_GTE.max(axis=-1)),
        dropped=choices - kept_E.sum(),
        expected_dropped=expected_dropped,
        tokens=tokens,
        choices=choices,
        unserved=total(~served_GT),
        smooth_load_E=smooth_load_E,
        sequence_balance_sum=jnp.sum(loss_GR),  # 0 for a sequence without a token
        sequences=jnp.sum(tokens_GR > 0).astype(jnp.float32),
    )


def _count_choices(decision: Decision) -> Float[Array, "G T E"]:
    """How often each token goes to each expert; for a soft mixture, its share of the token's result."""
    if isinstance(decision, SoftMix):
        return decision.probs_GTE
    num_tokens, num_experts = decision.probs_GTE.shape[-2:]
    if isinstance(decision, Routing):
        # Expert E, a choice that is not used, is no row of one_hot's, so it is in no load.
        return jax.nn.one_hot(decision.expert_GTK, num_experts).sum(axis=-2)

    def count(token_EC):
        expert_E = jnp.arange(num_experts)[:, None]
        return jnp.zeros((num_tokens, num_experts)).at[token_EC, expert_E].add(1.0, mode="drop")

    return jax.vmap(count)(decision.token_GEC)


def _count_kept(
    decision: Decision, plan: SlotPlan | SortPlan | SoftMix, load_GTE: Float[Array, "G T E"]
) -> tuple[Float[Array, " E"], Bool[Array, "G T"]]:
    """What each expert reads, and which tokens are read by any."""
    if isinstance(plan, SortPlan):
        kept_GT = jnp.any(plan.row_NK < plan.token_R.size, axis=1).reshape(load_GTE.shape[:2])
        return plan.size_E.astype(jnp.float32), kept_GT
    if isinstance(decision, ExpertChoice) or isinstance(plan, SoftMix):
        return load_GTE.sum(axis=(0, 1)), load_GTE.sum(axis=-1) > 0
    kept_E = jnp.sum(plan.token_GEC < decision.mask_GT.shape[-1], axis=(0, 2)).astype(jnp.float32)
    return kept_E, plan.kept_GTK.any(axis=-1)


def _drop_by_chance(
    routing: Routing, plan: SlotPlan, next_choice: bool, seats_N: tuple[int, ...] | None
) -> Float[Array, ""]:
    """What would find no seat if every token drew its experts evenly at random."""
    num_tokens, k = routing.expert_GTK.shape[-2:]
    num_experts, seats = plan.token_GEC.shape[-2:]
    used_GTK = (routing.expert_GTK < num_experts) & routing.mask_GT[..., None]
    used_G = used_GTK.sum(axis=(-2, -1))
    real_G = routing.mask_GT.sum(axis=-1)
    if next_choice:
        seats_G = seats if seats_N is None else jnp.asarray(seats_N)[real_G]
        return jnp.sum(jnp.maximum(used_G - num_experts * seats_G, 0)).astype(jnp.float32)
    whole_G, rest_G = jnp.divmod(used_G, k)

    def read(table_N: np.ndarray) -> Array:
        floor_N = jnp.asarray(np.append(table_N, table_N[-1]), jnp.float32)
        return floor_N[whole_G] + rest_G / k * (floor_N[whole_G + 1] - floor_N[whole_G])

    floor_G = read(expected_drop_table(num_tokens, num_experts, k, seats))
    if seats_N is not None:
        # A choice that is not used counts as padding here, where there is padding.
        floor_G = jnp.where(real_G == num_tokens, floor_G, read(padded_drop_table(num_experts, k, seats_N)))
    return jnp.sum(floor_G)
