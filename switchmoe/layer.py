"""The MoE layer: route, plan, dispatch, experts, combine, as one pure function."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from switchmoe.config import MoEConfig
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.dispatching.sums import sum_routing
from switchmoe.execution import Executor, ExpertFn, Plan, execute_local, make_plan
from switchmoe.experts import ExpertParams, apply_experts, init_experts
from switchmoe.inputs import check_inputs
from switchmoe.routing import (
    Decision,
    ExpertChoice,
    MoEAux,
    Router,
    RouterParams,
    Routing,
    group_keys,
    make_router,
)
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key
from switchmoe.sorted_experts import apply_experts_sorted


class MoEParams(NamedTuple):
    """A MoE layer's weights. There are no biases.

    Attributes:
      router: the router's, always float32: a matrix [D, E] for most, what its `init` says for the others.
      experts: the experts'.
      shared: the FFN that every token passes through, as one expert of `shared_experts * d_ff` hidden
        features; None without shared experts.
    """

    router: RouterParams
    experts: ExpertParams
    shared: ExpertParams | None = None


class Trace(NamedTuple):
    """Where each token went, in the shape of the rows it came in.

    K is the router's k. Where tokens do not choose experts it is E, expert by expert: with expert choice, E
    in the place of an expert that did not choose the token; with Soft MoE, every expert, with its share.

    Attributes:
      expert_SK: the experts each token chose, best first; E where a choice is not used.
      weight_SK: the weight of each choice.
      kept_SK: True where the choice got a seat.
    """

    expert_SK: Int[Array, "*B S K"]
    weight_SK: Float[Array, "*B S K"]
    kept_SK: Bool[Array, "*B S K"]


def init_moe(key: ScalarKey, config: MoEConfig, dtype: DTypeLike = jnp.float32) -> MoEParams:
    """Draw a layer's weights, the experts' in `dtype` and the router's in float32."""

    def draw(name: str, num_experts: int, d_ff: int) -> ExpertParams:
        return init_experts(
            named_key(key, name),
            num_experts=num_experts,
            d_model=config.d_model,
            d_ff=d_ff,
            gated=config.gated,
            init_scale=config.init_scale,
            dtype=dtype,
        )

    router = make_router(config).init(named_key(key, "router"))
    shared = draw("shared", 1, config.shared_experts * config.d_ff) if config.shared_experts else None
    return MoEParams(router, draw("experts", config.num_experts, config.d_ff), shared)


def moe(
    params: MoEParams,
    x: Float[Array, "*B S D"],
    config: MoEConfig,
    *,
    train: bool = False,
    key: ScalarKey | None = None,
    mask: Bool[Array, "*B S"] | None = None,
    token_ids: Int[Array, "*B S"] | None = None,
    bias: Float[Array, " E"] | None = None,
    replay: Int[Array, "*B S K"] | None = None,
    first_group: Int[Array, ""] | int = 0,
    execute: Executor | None = None,
    sum_across: Callable[[MoEAux], MoEAux] = lambda aux: aux,
) -> tuple[Float[Array, "*B S D"], MoEAux]:
    """Send each token through its experts and return the weighted sum of what they say.

    A dropped or masked token gets exactly 0 (a dropped one what the shared experts say, if there are any), so
    a residual connection carries it. Rows of the last two dimensions are sequences, cut into groups of
    `config.sequences_per_group` consecutive rows, or one group if `x` is [T, D]; capacity and drop order live
    inside a group.

    Args:
      params: the layer's weights, from `init_moe`.
      x: activations in any float dtype (float32 or bfloat16 when dropless); the experts compute in it, the
        router in float32.
      config: what the layer is.
      train: use the training capacity factor, and the noise that the config asks for.
      key: source of that noise; needed in training when the config draws any. In evaluation only the
        benchmark router "random" reads it.
      mask: False at padding. Such a position takes no seat and counts in no sum; what stands there, even a
        NaN, changes nothing.
      token_ids: the ids of the tokens, for a router that looks at them ("hash").
      bias: added to the router's probabilities (or sigmoids) for the choice of experts only; see
        `update_bias`. Routers that refuse `bias_step` do not read it.
      replay: experts to use instead of the router's choice, as `Trace.expert_SK` of an earlier call; E where
        a choice is not used. Their weights are computed again, so the router keeps its gradient. Seats are
        given out again too, in the config's order. The load counts these choices (with overflow="next" the
        ones that tokens ended at, not their first wishes), the probabilities are the router's own.
      first_group: index of the first group in the whole batch, for noise that does not follow the devices.
      execute: carries tokens to experts and back; `execute_local` unless given.
      sum_across: adds the aux sums over devices; nothing to add unless given.

    Returns:
      The outputs, in the shape and dtype of `x`, and the sums that `summarize` and `aux_loss` read.

    Raises:
      ValueError: one sentence, before any computation, if shapes or arguments do not fit the config.

    Source: Switch Transformers, section 2, https://arxiv.org/abs/2101.03961.
    """
    y, aux, _ = moe_with_trace(
        params,
        x,
        config,
        train=train,
        key=key,
        mask=mask,
        token_ids=token_ids,
        bias=bias,
        replay=replay,
        first_group=first_group,
        execute=execute,
        sum_across=sum_across,
    )
    return y, aux


def moe_with_trace(
    params: MoEParams,
    x: Float[Array, "*B S D"],
    config: MoEConfig,
    *,
    train: bool = False,
    key: ScalarKey | None = None,
    mask: Bool[Array, "*B S"] | None = None,
    token_ids: Int[Array, "*B S"] | None = None,
    bias: Float[Array, " E"] | None = None,
    replay: Int[Array, "*B S K"] | None = None,
    first_group: Int[Array, ""] | int = 0,
    execute: Executor | None = None,
    sum_across: Callable[[MoEAux], MoEAux] = lambda aux: aux,
) -> tuple[Float[Array, "*B S D"], MoEAux, Trace]:
    """Do what `moe` does, and say where each token went."""
    given = dict(mask=mask, token_ids=token_ids, bias=bias, replay=replay)
    check_inputs(params, x, config, train=train, key=key, **given)
    rows_per_group = 1 if x.ndim == 2 else config.sequences_per_group
    num_groups = math.prod(x.shape[:-2]) // rows_per_group
    x_GTD = x.reshape(num_groups, -1, config.d_model)

    def by_group(value):
        return None if value is None else value.reshape(x_GTD.shape[:2])

    mask_GT = by_group(mask)
    if mask_GT is not None:
        x_GTD = jnp.where(mask_GT[..., None], x_GTD, 0)

    router_key = dropout_key = None
    if key is None and not train:  # for "random", the only one that draws here; by group all the same
        router_key = group_keys(jax.random.key(0), num_groups, first_group)
    elif key is not None:
        # The name is a salt, from when jitter was all a router drew; another one would draw other noise.
        router_key = group_keys(named_key(key, "jitter"), num_groups, first_group)
        dropout_key = named_key(key, "expert_dropout") if train else None
    router = make_router(config)
    wanted = router.apply(
        params.router,
        x_GTD,
        key=router_key,
        mask=mask_GT,
        token_ids=by_group(token_ids),
        bias=bias,
        train=train,
    )
    if replay is not None:
        replay_GTK = replay.reshape(*x_GTD.shape[:2], replay.shape[-1])
        wanted = _replay(wanted, router, config, replay_GTK)
    decision, plan = make_plan(wanted, router, config, train=train)

    options = dict(
        activation=config.activation,
        dropout=config.expert_dropout,
        key=dropout_key,
        group_G=first_group + jnp.arange(num_groups),
    )
    expert_fn: ExpertFn = functools.partial(apply_experts, **options)
    if isinstance(plan, SortPlan):
        expert_fn = functools.partial(apply_experts_sorted, implementation=config.matmul, **options)
    if execute is None:
        execute = functools.partial(execute_local, dispatch=config.dispatch)
    y_GTD = execute(x_GTD, plan, expert_fn, params.experts)
    if params.shared is not None:
        # To the noise of expert dropout it is the expert after the last.
        shared = functools.partial(apply_experts, expert_E=jnp.array([config.num_experts]), **options)
        y_GTD = y_GTD + shared(params.shared, x_GTD[None])[0]
    aux = sum_routing(wanted, plan, sequences_per_group=rows_per_group, next_choice=config.overflow == "next")
    trace = Trace(*(a.reshape(*x.shape[:-1], a.shape[-1]) for a in _trace(decision, plan)))
    return y_GTD.reshape(x.shape), sum_across(aux), trace


def _replay(decision: Decision, router: Router, config: MoEConfig, expert_GTK: Array) -> Routing:
    """Put given experts in the place of a router's choices, and weigh them by its scores."""
    if not isinstance(decision, Routing) or router.weigh is None:
        raise ValueError(
            f"router={config.router!r} does not let tokens choose experts, so there are no choices to "
            "replay; leave replay=None."
        )
    if expert_GTK.shape[-1] != config.top_k or not jnp.issubdtype(expert_GTK.dtype, jnp.integer):
        raise ValueError(
            f"replay holds {expert_GTK.shape[-1]} choices a token, as {expert_GTK.dtype}, but top_k is "
            f"{config.top_k}; replay whole numbers from a trace of a layer with this config."
        )
    is_expert_GTK = (expert_GTK >= 0) & (expert_GTK < config.num_experts)
    expert_GTK = jnp.where(is_expert_GTK, expert_GTK, config.num_experts).astype(jnp.int32)
    weight_GTK = router.weigh(decision.logits_GTE, expert_GTK)
    return decision._replace(expert_GTK=expert_GTK, weight_GTK=weight_GTK)


def _trace(decision: Decision, plan: Plan) -> tuple[Array, Array, Array]:
    """Which experts [G, T, K] each token went to, with which weight, and whether there was a seat for it."""
    num_tokens, num_experts = decision.probs_GTE.shape[-2:]
    if isinstance(decision, Routing):
        if isinstance(plan, SlotPlan):
            return decision.expert_GTK, decision.weight_GTK, plan.kept_GTK
        kept_GTK = (decision.expert_GTK < num_experts) & decision.mask_GT[..., None]
        return decision.expert_GTK, decision.weight_GTK, kept_GTK
    expert_GTE = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), decision.probs_GTE.shape)
    if not isinstance(decision, ExpertChoice):
        return expert_GTE, decision.probs_GTE, jnp.broadcast_to(decision.mask_GT[..., None], expert_GTE.shape)

    def weigh(token_EC, weight_EC):  # each token's weight at each expert, 0 where it was not chosen
        expert_E = jnp.arange(num_experts)[:, None]
        sits_TE = jnp.zeros((num_tokens, num_experts), bool).at[token_EC, expert_E].set(True, mode="drop")
        zeros_TE = jnp.zeros((num_tokens, num_experts))
        return sits_TE, zeros_TE.at[token_EC, expert_E].set(weight_EC, mode="drop")

    sits_GTE, weight_GTE = jax.vmap(weigh)(decision.token_GEC, decision.weight_GEC)
    return jnp.where(sits_GTE, expert_GTE, num_experts), weight_GTE, sits_GTE
