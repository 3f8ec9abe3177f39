"""The loss of a step's batch, and its gradient, taken over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from switchmoe.data import Batch
from switchmoe.parallel import Layout
from switchmoe.routing import MoEAux, aux_loss
from switchmoe.shapes import Array, Float, Int, ScalarKey
from switchmoe.train.config import TrainConfig
from switchmoe.train.distil import soften
from switchmoe.train.model import Params, PureModel, join
from switchmoe.train.weights import split_like_weights

# Each layer's load and choices, for a balance loss over more tokens than a micro-batch has.
Loads = tuple[Float[Array, "L E"], Float[Array, " L"]]


def make_gradient(
    config: TrainConfig, model: PureModel, teacher: PureModel | None = None
) -> Callable[..., Any]:
    """Build `(params, biases, batch, key, taught=None) -> ((loss, (cross_entropy, aux)), gradients)`.

    The loss is the cross-entropy of the next token in float32, weighted by `batch.weight_BS`, plus the
    router losses of `model.moe` (`aux_loss`). With `accumulate` micro-batches each has router losses of its
    own, from its own sums, and everything is averaged with the micro-batch's share of the weight; `aux` is
    summed over them. Only with `balance_over="batch"` the balance loss takes each expert's share of choices f
    from all of the step's micro-batches, which a first forward pass counts, and the mean probability P from
    its own (Qiu et al. 2025, section 3, https://arxiv.org/abs/2501.11873).

    `biases` are whatever the model reads beside `params`, without a gradient. With a `teacher`, whose weights
    are `taught`, a share `tune.soft_share` of the cross-entropy is that against the teacher's probabilities
    (`soften`); the teacher sees each micro-batch at evaluation capacity and without noise.

    The rows of a batch are in its first dimension, or already parted in micro-batches by its first two. On a
    mesh (`model.layout`) every micro-batch is split over the devices, and gradients are kept as weights are.
    """
    accumulate, moe = config.train.accumulate, config.model.moe
    count_first = accumulate > 1 and moe is not None and moe.balance_over == "batch" and moe.balance_coef > 0

    def loss(
        params: Params, biases: Params, batch: Batch, total_weight: Array, key: ScalarKey, loads, taught
    ):
        logits_BSV, aux = forward(model, join(params, biases), batch, train=True, key=key)
        targets_BS, weight_BS = jnp.asarray(batch.targets_BS), jnp.asarray(batch.weight_BS)
        cross_entropy = weighted_cross_entropy(logits_BSV, targets_BS, weight_BS) / total_weight
        objective = cross_entropy
        if teacher is not None:
            teacher_BSV = forward(teacher, taught, batch, train=False)[0]
            each_BS, soft = weight_BS / total_weight, config.tune.soft_share
            objective = soften(cross_entropy, logits_BSV, teacher_BSV, each_BS, share=soft)
        share = jnp.sum(weight_BS) / total_weight
        router_loss = 0.0
        if aux is not None and moe is not None:
            # Of the losses, that of balance alone reads load_E and choices.
            counted = aux if loads is None else aux._replace(load_E=loads[0], choices=loads[1])
            router_loss = aux_loss(counted, moe)
        return objective + share * router_loss, (cross_entropy, aux)

    def of_micro_batch(*inputs: Any):
        value, gradients = jax.value_and_grad(loss, has_aux=True)(*inputs)
        return value, split_like_weights(model.layout, gradients)

    def gradient(params: Params, biases: Params, batch: Batch, key: ScalarKey, taught: Params | None = None):
        total_weight = jnp.maximum(jnp.sum(batch.weight_BS), 1.0)
        if accumulate == 1:
            return of_micro_batch(params, biases, batch, total_weight, key, None, taught)
        rows = _micro_batches(batch, accumulate, model.layout)

        def count(micro_batch: Batch, micro_key: ScalarKey) -> Loads:
            everything = join(params, biases)
            aux: MoEAux = forward(model, everything, micro_batch, train=True, key=micro_key)[1]
            return aux.load_E, aux.choices

        loads = _sum_over_micro_batches(count, rows, key) if count_first else None
        return _sum_over_micro_batches(
            lambda micro_batch, micro_key: of_micro_batch(
                params, biases, micro_batch, total_weight, micro_key, loads, taught
            ),
            rows,
            key,
        )

    return gradient


def _micro_batches(batch: Batch, accumulate: int, layout: Layout | None) -> Batch:
    """Part the rows of a batch, unless they are parted, and split each part over the devices of a mesh."""
    if batch.ids_BS.ndim == 3:
        return batch
    rows = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)
    if layout is None:
        return rows
    return jax.lax.with_sharding_constraint(rows, layout.sharding(PartitionSpec(None, *layout.batch_spec())))


def _sum_over_micro_batches(function: Callable[..., Any], rows: Batch, key: ScalarKey) -> Any:
    """Add up what `function(micro_batch, key)` returns, one after the other, each with its key."""

    def add(total, index_and_rows):
        index, micro_batch = index_and_rows
        part = function(micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, part), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], rows), key)
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(rows.ids_BS.shape[0]), rows))[0]


def weighted_cross_entropy(
    logits_BSV: Float[Array, "B S V"], targets_BS: Int[Array, "B S"], weight_BS: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Sum over tokens of weight times -log p(target), in nats and float32; 0 where the weight is 0."""
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV.astype(jnp.float32), targets_BS)
    return jnp.sum(jnp.where(weight_BS == 0, 0.0, nats_BS * weight_BS))


def forward(model: PureModel, params: Params, batch: Batch, *, train: bool, key: ScalarKey | None = None):
    """Run the model over a batch with its segments, positions and mask; returns (logits_BSV, aux).

    A batch with a source goes through the encoder too.
    """
    source = {}
    if batch.source_BP is not None:
        source = dict(source_BP=batch.source_BP, source_mask_BP=batch.source_mask_BP)
    return model.apply(
        params,
        batch.ids_BS,
        **source,
        segments_BS=batch.segments_BS,
        positions_BS=batch.positions_BS,
        mask_BS=batch.mask_BS,
        train=train,
        key=key,
    )
