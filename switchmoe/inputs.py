"""What `moe` says about inputs that do not fit the config, before it computes anything."""

import functools
import math

import jax

from switchmoe.config import MoEConfig
from switchmoe.dispatching.grouped_matmul import choose_backend
from switchmoe.routing import make_router


def check_inputs(params, x, config: MoEConfig, *, train, key, mask, token_ids, bias, replay) -> None:
    """Raise a ValueError of one sentence if the arguments of `moe` do not fit the config or each other."""
    if x.ndim < 2 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"x has shape {x.shape}, but must end in [tokens, d_model] with d_model={config.d_model}; "
            "reshape x or change d_model."
        )
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}, which holds no token; give it at least one.")
    _check_experts(params, config)
    if train and not params.experts.trainable:
        raise ValueError(
            "These experts are laid out or rounded for generating, and can't be trained; train the ones that "
            "they were made of."
        )
    rows = math.prod(x.shape[:-2])
    if x.ndim > 2 and rows % config.sequences_per_group:
        raise ValueError(
            f"x has {rows} rows, which sequences_per_group={config.sequences_per_group} does not divide; "
            "change the number of rows or sequences_per_group."
        )
    for name, value in {"mask": mask, "token_ids": token_ids}.items():
        if value is not None and value.shape != x.shape[:-1]:
            raise ValueError(
                f"{name} has shape {value.shape}, but x has {x.shape[:-1]} positions; make them equal."
            )
    if bias is not None and bias.shape != (config.num_experts,):
        raise ValueError(
            f"bias has shape {bias.shape}, but needs an entry for each of num_experts={config.num_experts}."
        )
    if config.dispatch == "dropless":
        choose_backend(config.matmul)
    if replay is not None and replay.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"replay has shape {replay.shape}, but x has {x.shape[:-1]} positions with some choices each; "
            "replay a trace of rows of the same shape."
        )
    noise = {name: getattr(config, name) for name in ("jitter", "input_dropout", "expert_dropout")}
    if train and key is None and any(noise.values()):
        drawn = " and ".join(f"{name}={rate}" for name, rate in noise.items() if rate)
        raise ValueError(f"Training with {drawn} draws noise, so moe(..., train=True) needs a key.")


@functools.lru_cache(maxsize=256)
def _router_shapes(config: MoEConfig) -> list[tuple[int, ...]]:
    shapes = jax.eval_shape(make_router(config).init, jax.random.key(0))
    return [leaf.shape for leaf in jax.tree.leaves(shapes)]


def _check_experts(params, config: MoEConfig) -> None:
    experts, shared = params.experts, params.shared
    found = [leaf.shape for leaf in jax.tree.leaves(params.router)]
    expected = _router_shapes(config)
    if found != expected:
        raise ValueError(
            f"The parameters hold router weights of shapes {found}, but router={config.router!r} here has "
            f"{expected}; initialise them with this config."
        )
    found = (experts.sizes, experts.gated)
    expected = ((config.num_experts, config.d_model, config.d_ff), config.gated)
    if found != expected:
        raise ValueError(
            f"The parameters hold experts of (shape, gated) = {found}, but the config asks for {expected}; "
            "initialise them with this config."
        )
    width = 0 if shared is None else shared.w_in_EDF.shape[-1]
    if width != config.shared_experts * config.d_ff:
        raise ValueError(
            f"The parameters hold {width} shared hidden features, but shared_experts * d_ff is "
            f"{config.shared_experts * config.d_ff}; initialise them with this config."
        )
