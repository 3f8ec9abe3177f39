"""A gradient's way to an update: clipped, scaled by its history, decayed, multiplied by the learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from switchmoe.train.adafactor import scale_by_adafactor
from switchmoe.train.config import OptimizerConfig
from switchmoe.train.schedule import learning_rate
from switchmoe.train.weights import matrix_mask


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer of a run of `steps` steps.

    The gradient is scaled to a global norm of at most `clip_norm`, over all weights together; then AdamW
    (Loshchilov & Hutter 2019, algorithm 2, https://arxiv.org/abs/1711.05101) or Adafactor scales it; then
    `weight_decay` times the weight is added, for matrices only (embeddings and the router too; not the
    scales of norms); then the learning rate multiplies both. `update` takes the gradient's norm as `norm`,
    where it is known already.
    """
    if config.name == "adamw":
        scale = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    else:
        scale = scale_by_adafactor(config.factor_at_least)
    return optax.chain(
        _clip(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=matrix_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which has to take the norm itself, by a norm that may be given."""

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any):
        factor = jnp.minimum(1.0, most / (optax.global_norm(updates) if norm is None else norm))
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
