"""What one sparse layer costs a token, whatever its router: weights met, and multiply-adds."""

import functools
import math

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig
from switchmoe.routing import Decision, ExpertChoice, SoftMix, make_router
from switchmoe.seats import expert_seats


@functools.lru_cache(maxsize=256)
def decide_shapes(moe: MoEConfig, tokens: int) -> Decision:
    """Say what a router decides about a group of so many tokens in training, as shapes without numbers."""
    router = make_router(moe)

    def decide(key, x_GTD, ids_GT):
        return router.apply(router.init(key), x_GTD, key=key, mask=None, token_ids=ids_GT, train=True)

    x_GTD = jax.ShapeDtypeStruct((1, tokens, moe.d_model), jnp.float32)
    return jax.eval_shape(decide, _key_shape(), x_GTD, jax.ShapeDtypeStruct((1, tokens), jnp.int32))


def useful_products(moe: MoEConfig, group: int | None) -> float:
    """Count the multiply-adds a token of a layer's matrix products, in groups of `group` tokens.

    Counted are the router, shared experts, and the experts a token is sent to: k; with expert choice as many
    as choose it on average, E experts of C seats for T tokens; with Soft MoE the E * C mixtures that T tokens
    are read as, and their mixing and unmixing.

    Raises:
      ValueError: if `group` is None although the cost depends on it.
    """
    always = _router_sizes(moe)[1] + moe.shared_experts * expert_weights(moe)
    decision = decide_shapes(moe, group or 1)
    if not isinstance(decision, ExpertChoice | SoftMix):
        return always + moe.top_k * expert_weights(moe)
    if group is None:
        raise ValueError(
            f"What router={moe.router!r} costs a token depends on the tokens of a group; "
            "say the length of a row, sequence_length."
        )
    if isinstance(decision, ExpertChoice):
        return always + decision.token_GEC.size / group * expert_weights(moe)
    mixtures = math.prod(decision.combine_GTEC.shape[-2:])
    return always + mixtures / group * expert_weights(moe) + 2 * mixtures * moe.d_model


def executed_products(moe: MoEConfig, group: int) -> float:
    """Count what is computed for it: every seat of the experts at the training capacity, empty ones too.

    And the one-hot products where `dispatch` is "einsum". Dropless experts have no empty seat.
    """
    useful, decision = useful_products(moe, group), decide_shapes(moe, group)
    if isinstance(decision, SoftMix) or moe.dispatch == "dropless":
        return useful
    seats = moe.num_experts * expert_seats(moe, tokens=group, train=True)
    one_hot = 2 * seats * moe.d_model if moe.dispatch == "einsum" else 0
    if isinstance(decision, ExpertChoice):
        return useful + one_hot
    return useful + (seats / group - moe.top_k) * expert_weights(moe) + one_hot


def layer_weights(moe: MoEConfig) -> tuple[int, int]:
    """Count a layer's parameters: all, and without the experts that a token is not sent to.

    A token is sent to k experts (with expert choice too, where that is a nominal number), but meets all of
    them with Soft MoE.
    """
    always = _router_sizes(moe)[0] + moe.shared_experts * expert_weights(moe)
    met = moe.num_experts if isinstance(decide_shapes(moe, 1), SoftMix) else moe.top_k
    return always + moe.num_experts * expert_weights(moe), always + met * expert_weights(moe)


def competes_for_seats(moe: MoEConfig) -> bool:
    """Say whether a token can be dropped because its expert is full."""
    return moe.dispatch != "dropless" and not isinstance(decide_shapes(moe, 1), ExpertChoice | SoftMix)


def expert_weights(moe: MoEConfig) -> int:
    """Count the weights of one expert."""
    return (3 if moe.gated else 2) * moe.d_model * moe.d_ff


def _router_sizes(moe: MoEConfig) -> tuple[int, int]:
    """Count the router's parameters, and those of its matrices, one multiply-add a token each."""
    weights = jax.tree.leaves(jax.eval_shape(make_router(moe).init, _key_shape()))
    return sum(weight.size for weight in weights), sum(weight.size for weight in weights if weight.ndim > 1)


def _key_shape() -> jax.ShapeDtypeStruct:
    """What a key looks like. Making one would start jax's devices, which processes have to join first."""
    return jax.eval_shape(lambda: jax.random.key(0))
