"""Sparse upcycling: the FFNs of a dense model become the experts of a sparse one."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from switchmoe.config import MoEConfig, check_choice
from switchmoe.models import LMConfig
from switchmoe.routing import make_router
from switchmoe.shapes import Array, Bool, Float, ScalarKey, named_key
from switchmoe.transfer.trees import (
    Params,
    rearrange_layers,
    refuse_separate_blocks,
    replace_stacks,
    stacks,
)

How = Literal["copy", "noise", "partial"]
# A router whose probabilities are the weights starts so much smaller than it would be drawn: all its
# probabilities are 1 / E then to some 1e-6, and yet every token has a best expert.
QUIET = 1e-5
# How much noise there is, and which share starts anew, unless said.
NOISE, FRACTION = 0.05, 0.5
# The dense FFN's matrices, and the experts'.
_MATRICES = {"w_in_DF": "w_in_EDF", "w_gate_DF": "w_gate_EDF", "w_out_FD": "w_out_EFD"}


def upcycle(
    params: Params,
    config: LMConfig,
    *,
    num_experts: int,
    top_k: int = 2,
    how: How = "copy",
    moe_every: int | None = None,
    encoder_moe_every: int | None = None,
    noise: float = NOISE,
    fraction: float = FRACTION,
    key: ScalarKey,
    **layer: Any,
) -> tuple[Params, LMConfig]:
    """Make experts out of a dense model's FFNs, so that a token is first treated as it was before.

    The last FFN of every super-block becomes `num_experts` experts of its width and a router; all else is
    kept. `how` the experts begin:

    - "copy": as the FFN, all alike; they part by the tokens they get (Komatsuzaki et al. 2022).
    - "noise": the same, plus normal noise of `noise` times the deviation of each matrix.
    - "partial": in each expert a `fraction` of the hidden features, drawn for it alone, starts anew in all
      its matrices, normal with mean and deviation of what they had there (Drop-Upcycling, section 3).

    With "copy" the sparse model's function is the dense one's, up to rounding (1e-5 of the largest logit),
    as long as no token is dropped, since a token's weights add to 1: by definition with renormalised top-k
    (the default) or "top_k_then_softmax". Where the weights are the router's probabilities themselves
    ("switch", or "top_k" without `renormalize`) they add to k / E while the router says nothing. So there the
    experts' last matrix is multiplied by E / k, and the router starts `QUIET` times smaller than usual: its
    choices are as varied as ever, but its probabilities all equal. Mind that there a router that becomes sure
    of itself makes the outputs larger, up to E / k times, which training has to undo; renormalised weights
    have no such drift. ("sigmoid" is treated by the same rule.)

    Args:
      params: the dense model's weights.
      config: its shape; a twin's `d_ff_sparse` is the experts' width.
      num_experts, top_k: of every sparse layer.
      moe_every: layers in a super-block, of which the last becomes sparse; None for the dense config's own.
      encoder_moe_every: the same of an encoder.
      key: draws routers, noise and what starts anew.
      layer: further settings of `MoEConfig`. Unless given, `router` is "top_k" with `renormalize` ("switch"
        where top_k is 1) and `dispatch` is "dropless", so that nothing is dropped; with "gather" the capacity
        decides, and `drop_order` has to be "token".

    Returns:
      The weights and the config of the sparse model.

    Raises:
      ValueError: one sentence, if the model is sparse already, its layers do not divide, or a setting does
        not fit.

    Source: https://arxiv.org/abs/2212.05055; https://arxiv.org/abs/2502.19261 ("partial").
    """
    check_choice("how", how, get_args(How))
    _check_amounts(how, noise, fraction)
    places = dict(moe_every=moe_every, encoder_moe_every=encoder_moe_every)
    sparse = sparse_config(config, num_experts=num_experts, top_k=top_k, **places, **layer)
    moe = sparse.moe
    assert moe is not None
    blocks = []
    for (stack, own), (_, wanted) in zip(stacks(params, config), stacks(params, sparse), strict=True):
        layers = rearrange_layers(stack["blocks"], own.moe_every, wanted.moe_every)
        last = f"layer_{wanted.moe_every - 1}"
        stack_key = named_key(key, f"stack_{len(blocks)}")
        become = _become_experts(layers[last]["feed_forward"], moe, how, noise, fraction, stack_key)
        blocks.append({**layers, last: {**layers[last], "feed_forward": become}})
    return replace_stacks(params, blocks), sparse


def _check_amounts(how: How, noise: float, fraction: float) -> None:
    if not 0 <= noise < float("inf") or not 0 <= fraction <= 1:
        raise ValueError(f"noise is {noise} and fraction {fraction}; give one from 0 on and one in [0, 1].")
    for name, value, usual, reader in (
        ("noise", noise, NOISE, "noise"),
        ("fraction", fraction, FRACTION, "partial"),
    ):
        if value != usual and how != reader:
            raise ValueError(f"{name}={value} is for how={reader!r}, but how is {how!r}; leave it alone.")


def sparse_config(
    config: LMConfig,
    *,
    num_experts: int,
    top_k: int = 2,
    moe_every: int | None = None,
    encoder_moe_every: int | None = None,
    **layer: Any,
) -> LMConfig:
    """Give the shape of the sparse model that `upcycle` makes of a dense one; it raises as that does."""
    refuse_separate_blocks(config)
    if config.moe is not None:
        raise ValueError(
            f"the model is sparse already, with {config.moe.num_experts} experts; upcycle a dense one."
        )
    moe = _layer_config(config, num_experts, top_k, layer)
    if encoder_moe_every is None:
        encoder_moe_every = config.encoder_moe_every
    sparse = dataclasses.replace(
        config,
        moe=moe,
        moe_every=config.moe_every if moe_every is None else moe_every,
        encoder_moe_every=encoder_moe_every,
        d_ff_sparse=None,
    )
    two_widths = config.d_ff_sparse not in (None, config.d_ff)
    if two_widths and _periods(sparse) != _periods(config):
        raise ValueError(
            f"the FFNs have two widths, d_ff={config.d_ff} and d_ff_sparse={config.d_ff_sparse}, so only "
            "those of the second can become sparse; leave moe_every and encoder_moe_every alone."
        )
    return sparse


def _layer_config(config: LMConfig, num_experts: int, top_k: int, layer: dict[str, Any]) -> MoEConfig:
    taken = {"d_model", "d_ff", "activation", "gated"} & layer.keys()
    if taken:
        raise ValueError(f"{min(taken)} of an expert is that of the dense FFN, so it can't be chosen here.")
    router = layer.get("router", "switch" if top_k == 1 else "top_k")
    layer = {"router": router, "renormalize": router == "top_k" and top_k > 1, "dispatch": "dropless"} | layer
    moe = MoEConfig(
        d_model=config.d_model,
        d_ff=config.d_ff if config.d_ff_sparse is None else config.d_ff_sparse,
        num_experts=num_experts,
        top_k=top_k,
        activation=config.activation,
        gated=config.gated,
        **layer,
    )
    _weights_add_to(moe)
    make_router(moe)  # says what is wrong with the router's settings
    if moe.shared_experts:
        raise ValueError(
            f"shared_experts is {moe.shared_experts}, but a shared expert would count beside the copies of "
            "the FFN; set it to 0."
        )
    return moe


def _periods(config: LMConfig) -> tuple[int, int]:
    return config.moe_every, config.encoder_moe_every or config.moe_every


def _weights_add_to(moe: MoEConfig) -> float:
    """Say what a token's weights add to: always, or while the router finds all experts equal."""
    even = {"switch": 1 / moe.num_experts, "top_k": 1 / moe.num_experts, "sigmoid": 0.5}
    if moe.router == "top_k_then_softmax":
        return 1.0
    if moe.router not in even:
        known = ", ".join(sorted([*even, "top_k_then_softmax"]))
        raise ValueError(
            f"router={moe.router!r} has weights that are not known to keep what the dense model computes; "
            f"choose one of {known}."
        )
    scale = moe.weight_scale if moe.router == "sigmoid" else 1.0
    return scale * (1.0 if moe.renormalize else moe.top_k * even[moe.router])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _become_experts(
    dense: Params, moe: MoEConfig, how: How, noise: float, fraction: float, key: ScalarKey
) -> Params:
    """Make the weights of all sparse layers of a stack from those of as many FFNs, layers first."""
    num_layers = len(dense["w_in_DF"])
    keys_L = jax.random.split(named_key(key, "router"), num_layers)
    router_LDE = jax.vmap(make_router(moe).init)(keys_L)
    always_one = moe.renormalize or moe.router == "top_k_then_softmax"
    sparse = {"router_DE": router_LDE if always_one else QUIET * router_LDE}
    if moe.bias_step > 0:
        sparse["bias_E"] = jnp.zeros((num_layers, moe.num_experts), jnp.float32)
    anew_LEF = _draw_anew(named_key(key, "anew"), num_layers, moe, fraction) if how == "partial" else None
    for name, new in _MATRICES.items():
        if name not in dense:
            continue
        w = jnp.asarray(dense[name])[:, None]
        own_key, wide = named_key(key, new), w.astype(jnp.float32)
        shape = (num_layers, moe.num_experts, *w.shape[2:])
        if how == "noise":
            deviation = jnp.std(wide, axis=(-2, -1), keepdims=True)
            wide = wide + noise * deviation * jax.random.normal(own_key, shape)
        elif anew_LEF is not None:
            hidden_last = name.endswith("F")
            wide = _start_anew(wide, anew_LEF[..., None, :] if hidden_last else anew_LEF[..., None], own_key)
        if new == "w_out_EFD":
            wide = wide / _weights_add_to(moe)
        sparse[new] = jnp.broadcast_to(wide, shape).astype(w.dtype)
    return sparse


def _draw_anew(key: ScalarKey, num_layers: int, moe: MoEConfig, fraction: float) -> Bool[Array, "L E F"]:
    """Draw for every expert by itself which of its hidden features start anew: a fixed share of them."""
    order_LEF = jax.random.uniform(key, (num_layers, moe.num_experts, moe.d_ff)).argsort(-1).argsort(-1)
    return order_LEF < round(fraction * moe.d_ff)


def _start_anew(
    w: Float[Array, "L 1 I O"], anew: Bool[Array, "L E a b"], key: ScalarKey
) -> Float[Array, "L E I O"]:
    """Draw the rows or columns that are marked, with the mean and deviation they had in their matrix."""
    anew = jnp.broadcast_to(anew, (*anew.shape[:2], *w.shape[2:]))
    w = jnp.broadcast_to(w, anew.shape)
    count = jnp.maximum(anew.sum(axis=(-2, -1), keepdims=True), 1)
    mean = jnp.where(anew, w, 0).sum(axis=(-2, -1), keepdims=True) / count
    deviation = jnp.sqrt(jnp.where(anew, (w - mean) ** 2, 0).sum(axis=(-2, -1), keepdims=True) / count)
    return jnp.where(anew, mean + deviation * jax.random.normal(key, w.shape), w)
