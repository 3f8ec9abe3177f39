"""The MoE layer: route, plan, dispatch, experts, combine, as one pure function."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from switchmoe.config import Dispatch, MoEConfig
from switchmoe.dispatching.einsum import combine_einsum, dispatch_einsum
from switchmoe.dispatching.gather import combine_by_expert, dispatch_by_expert
from switchmoe.dispatching.seats import capacity
from switchmoe.dispatching.slots import SlotPlan, assign_slots
from switchmoe.dispatching.sums import sum_routing
from switchmoe.experts import ExpertParams, apply_experts, init_experts
from switchmoe.routing import MoEAux, group_keys, make_router
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key


class MoEParams(NamedTuple):
    """A MoE layer's weights: the router's [D, E], always float32, and the experts'. There are no biases."""

    router_DE: Float[Array, "D E"]
    experts: ExpertParams


class Trace(NamedTuple):
    """Where each token went, in the shape of the rows it came in.

    Attributes:
      expert_SK: the experts each token chose, best first; E where a choice is not used.
      weight_SK: the weight of each choice.
      kept_SK: True where the choice got a seat.
    """

    expert_SK: Int[Array, "*B S K"]
    weight_SK: Float[Array, "*B S K"]
    kept_SK: Bool[Array, "*B S K"]


ExpertFn = Callable[..., Float[Array, "E G C D"]]
Executor = Callable[[Float[Array, "G T D"], SlotPlan, ExpertFn, ExpertParams], Float[Array, "G T D"]]


def init_moe(key: ScalarKey, config: MoEConfig, dtype: DTypeLike = jnp.float32) -> MoEParams:
    """Draw a layer's weights, the experts' in `dtype` and the router's in float32."""
    router_DE = make_router(config).init(named_key(key, "router"))
    experts = init_experts(
        named_key(key, "experts"),
        num_experts=config.num_experts,
        d_model=config.d_model,
        d_ff=config.d_ff,
        gated=config.gated,
        init_scale=config.init_scale,
        dtype=dtype,
    )
    return MoEParams(router_DE, experts)


def execute_local(
    x_GTD: Float[Array, "G T D"],
    plan: SlotPlan,
    expert_fn: ExpertFn,
    expert_params: ExpertParams,
    *,
    dispatch: Dispatch = "gather",
) -> Float[Array, "G T D"]:
    """Carry each token to its experts and back when every expert is on this device."""
    if dispatch == "gather":
        return combine_by_expert(expert_fn(expert_params, dispatch_by_expert(x_GTD, plan)), plan)
    x_EGCD = rearrange(dispatch_einsum(x_GTD, plan), "G E C D -> E G C D")
    return combine_einsum(rearrange(expert_fn(expert_params, x_EGCD), "E G C D -> G E C D"), plan)


def moe(
    params: MoEParams,
    x: Float[Array, "*B S D"],
    config: MoEConfig,
    *,
    train: bool = False,
    key: ScalarKey | None = None,
    mask: Bool[Array, "*B S"] | None = None,
    bias: Float[Array, " E"] | None = None,
    first_group: Int[Array, ""] | int = 0,
    execute: Executor | None = None,
    sum_across: Callable[[MoEAux], MoEAux] = lambda aux: aux,
) -> tuple[Float[Array, "*B S D"], MoEAux]:
    """Send each token through its experts and return the weighted sum of what they say.

    A dropped or masked token gets exactly 0, so a residual connection carries it. Rows of the last two
    dimensions are sequences, cut into groups of `config.sequences_per_group` consecutive rows, or one group
    if `x` is [T, D]; capacity and drop order live inside a group.

    Args:
      params: the layer's weights, from `init_moe`.
      x: activations in any float dtype; the experts compute in it, the router in float32.
      config: what the layer is.
      train: use the training capacity factor, and the noise that the config asks for.
      key: source of that noise; needed in training when the config draws any. In evaluation only the
        benchmark router "random" reads it.
      mask: False at padding. Such a position takes no seat and counts in no sum; what stands there, even a
        NaN, changes nothing.
      bias: added to the router's probabilities (or sigmoids) for the choice of experts only; see
        `update_bias`.
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
        bias=bias,
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
    bias: Float[Array, " E"] | None = None,
    first_group: Int[Array, ""] | int = 0,
    execute: Executor | None = None,
    sum_across: Callable[[MoEAux], MoEAux] = lambda aux: aux,
) -> tuple[Float[Array, "*B S D"], MoEAux, Trace]:
    """Do what `moe` does, and say where each token went."""
    _check_inputs(params, x, config, train, key, mask)
    rows_per_group = 1 if x.ndim == 2 else config.sequences_per_group
    num_groups = math.prod(x.shape[:-2]) // rows_per_group
    x_GTD = x.reshape(num_groups, -1, config.d_model)
    mask_GT = None if mask is None else mask.reshape(x_GTD.shape[:2])
    if mask_GT is not None:
        x_GTD = jnp.where(mask_GT[..., None], x_GTD, 0)

    router_key = dropout_key = None
    if key is not None:
        # The name is a salt, from when jitter was all a router drew; another one would draw other noise.
        router_key = group_keys(named_key(key, "jitter"), num_groups, first_group)
        dropout_key = named_key(key, "expert_dropout") if train else None
    routing = make_router(config).apply(
        params.router_DE, x_GTD, key=router_key, mask=mask_GT, bias=bias, train=train
    )
    seats = expert_seats(config, tokens=x_GTD.shape[1], train=train)
    plan = assign_slots(routing, seats, config.drop_order)
    expert_fn = functools.partial(
        apply_experts,
        activation=config.activation,
        dropout=config.expert_dropout,
        key=dropout_key,
        group_G=first_group + jnp.arange(num_groups),
    )
    if execute is None:
        execute = functools.partial(execute_local, dispatch=config.dispatch)
    y_GTD = execute(x_GTD, plan, expert_fn, params.experts)
    aux = sum_across(sum_routing(routing, plan))
    by_row = (*x.shape[:-1], config.top_k)
    trace = Trace(*(a.reshape(by_row) for a in (routing.expert_GTK, routing.weight_GTK, plan.kept_GTK)))
    return y_GTD.reshape(x.shape), aux, trace


def expert_seats(config: MoEConfig, *, tokens: int, train: bool) -> int:
    """Count the seats of an expert in a group of `tokens`, as the config wants them."""
    if config.expert_capacity is not None:
        return min(config.expert_capacity, tokens)
    factor = config.capacity_factor if train else config.eval_capacity_factor
    return capacity(tokens, config.num_experts, config.top_k, factor)


def _check_inputs(params, x, config, train, key, mask) -> None:
    if x.ndim < 2 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"x has shape {x.shape}, but must end in [tokens, d_model] with d_model={config.d_model}; "
            "reshape x or change d_model."
        )
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}, which holds no token; give it at least one.")
    experts = params.experts
    found = (experts.w_in_EDF.shape, experts.w_gate_EDF is not None)
    expected = ((config.num_experts, config.d_model, config.d_ff), config.gated)
    if found != expected:
        raise ValueError(
            f"The parameters hold experts of (shape, gated) = {found}, but the config asks for {expected}; "
            "initialise them with this config."
        )
    rows = math.prod(x.shape[:-2])
    if x.ndim > 2 and rows % config.sequences_per_group:
        raise ValueError(
            f"x has {rows} rows, which sequences_per_group={config.sequences_per_group} does not divide; "
            "change the number of rows or sequences_per_group."
        )
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}, but x has {x.shape[:-1]} positions; make them equal.")
    noise = {name: getattr(config, name) for name in ("jitter", "input_dropout", "expert_dropout")}
    if train and key is None and any(noise.values()):
        drawn = " and ".join(f"{name}={rate}" for name, rate in noise.items() if rate)
        raise ValueError(f"Training with {drawn} draws noise, so moe(..., train=True) needs a key.")
