"""The MoE layer: route, plan, dispatch, experts, combine, as one pure function."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from switchmoe.config import MoEConfig
from switchmoe.dispatching.dropless import SortPlan
from switchmoe.dispatching.sums import sum_routing
from switchmoe.execution import WHOLE, ExpertFn, Shard, execute_local, make_plan
from switchmoe.experts import ExpertParams, apply_experts, init_experts
from switchmoe.inputs import check_inputs
from switchmoe.replay import Trace, replay_choices, where_tokens_went
from switchmoe.routing import (
    MoEAux,
    RouterParams,
    group_keys,
    make_router,
)
from switchmoe.seats import seats_by_tokens
from switchmoe.served_execution import execute_served
from switchmoe.served_experts import ServedExperts
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key
from switchmoe.sorted_experts import apply_experts_sorted


class MoEParams(NamedTuple):
    """A MoE layer's weights. There are no biases.

    Attributes:
      router: the router's, always float32: a matrix [D, E] for most, what its `init` says for the others.
      experts: the experts', or what `serve_experts` makes of them.
      shared: the FFN that every token passes through, as one expert of `shared_experts * d_ff` hidden
        features; None without shared experts.
    """

    router: RouterParams
    experts: ExpertParams
    shared: ExpertParams | None = None


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
    shard: Shard = WHOLE,
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
        NaN, changes nothing. Outside training it brings no seat either: a group has those of its real tokens.
      token_ids: the ids of the tokens, for a router that looks at them ("hash").
      bias: added to the router's probabilities (or sigmoids) for the choice of experts only; see
        `update_bias`. Routers that refuse `bias_step` do not read it.
      replay: experts to use instead of the router's choice, as `Trace.expert_SK` of an earlier call; E where
        a choice is not used. Their weights are computed again, so the router keeps its gradient. Seats are
        given out again too, in the config's order. The load counts these choices (with overflow="next" the
        ones that tokens ended at, not their first wishes), the probabilities are the router's own.
      shard: what to know where tokens or experts are split; `switchmoe.parallel.moe` fills it in.

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
        shard=shard,
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
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "*B S D"], MoEAux, Trace]:
    """Do what `moe` does, and say where each token went."""
    if not shard.checked:
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
        router_key = group_keys(jax.random.key(0), num_groups, shard.first_group)
    elif key is not None:
        # The name is a salt, from when jitter was all a router drew; another one would draw other noise.
        router_key = group_keys(named_key(key, "jitter"), num_groups, shard.first_group)
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
        wanted = replay_choices(wanted, router, config, replay_GTK)
    # Where nothing is said of padding there is none, and what is compiled is simpler.
    seats_N = None if mask is None else seats_by_tokens(config, tokens=x_GTD.shape[1], train=train)
    decision, plan = make_plan(wanted, router, config, train=train, seats_N=seats_N)
    plan = shard.admit(plan)

    options = dict(
        activation=config.activation,
        dropout=config.expert_dropout,
        key=dropout_key,
        group_G=shard.first_group + jnp.arange(num_groups),
        part_of_F=shard.part_of_F,
    )
    expert_fn: ExpertFn = functools.partial(apply_experts, **options)
    if isinstance(plan, SortPlan):
        expert_fn = functools.partial(apply_experts_sorted, implementation=config.matmul, **options)
    x_GTD = shard.to_experts(x_GTD)
    experts: ExpertParams | ServedExperts = params.experts
    if isinstance(experts, ServedExperts):
        y_GTD = execute_served(x_GTD, plan, experts, activation=config.activation, dispatch=config.dispatch)
    else:
        execute = shard.execute or functools.partial(execute_local, dispatch=config.dispatch)
        y_GTD = execute(x_GTD, plan, expert_fn, experts)
    if params.shared is not None:
        # To the noise of expert dropout it is the expert after the last.
        shared = functools.partial(apply_experts, expert_E=jnp.array([config.num_experts]), **options)
        y_GTD = y_GTD + shared(params.shared, x_GTD[None])[0]
    aux = sum_routing(
        wanted,
        plan,
        sequences_per_group=rows_per_group,
        next_choice=config.overflow == "next",
        seats_N=seats_N,
    )
    trace = Trace(*(a.reshape(*x.shape[:-1], a.shape[-1]) for a in where_tokens_went(decision, plan)))
    return y_GTD.reshape(x.shape), shard.sum_across(aux), trace
