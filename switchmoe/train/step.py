"""One step of training: a batch in, a better state out, and what there is to say about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchmoe.data import Batch
from switchmoe.routing import aux_loss, summarize
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key
from switchmoe.train.config import TrainConfig
from switchmoe.train.model import Params, PureModel
from switchmoe.train.optimizer import make_optimizer
from switchmoe.train.schedule import learning_rate


class TrainState(NamedTuple):
    """What a run carries from step to step; all of it is saved, so a run that starts again continues exactly.

    Attributes:
      params: the weights, nested dictionaries of float32 arrays.
      opt_state: the optimizer's, from optax.
      step: steps taken, skipped ones too; it is also the place in the data.
      skipped: steps whose loss or gradient was not finite.
      bad_in_a_row: how many of the last steps were skipped.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


TrainStep = Callable[[TrainState, Batch, ScalarKey], tuple[TrainState, dict[str, Array]]]


def init_state(config: TrainConfig, model: PureModel) -> TrainState:
    """Draw the first weights from the run's seed and give the optimizer an empty history."""
    params = model.init(named_key(jax.random.key(config.train.seed), "init"))
    # A buffer of its own for each counter: the step donates them, and none can be donated twice.
    step, skipped, bad_in_a_row = (jnp.array(0, jnp.int32) for _ in range(3))
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(params, opt_state, step, skipped, bad_in_a_row)


def make_train_step(config: TrainConfig, model: PureModel) -> TrainStep:
    """Build the pure function `(state, batch, key) -> (state, metrics)` of a run.

    The loss is the cross-entropy of the next token in float32, weighted by `batch.weight_BS`, plus the
    router losses of `model.moe`. With `accumulate` micro-batches the balance loss is that of each
    micro-batch (its f and P are means over the micro-batch), and everything is averaged with the
    micro-batch's share of the weight. `key` is the run's; the noise of a step comes from it and
    `state.step` alone.

    A loss or gradient norm that is not finite leaves weights and optimizer as they were; the step counts in
    `step`, `skipped` and `bad_in_a_row`. Once `max_bad_steps` came in a row no update happens any more, so
    whenever the host looks, it finds the state as it was when the limit was reached.
    """
    settings, optimizer = config.train, make_optimizer(config.optimizer, config.train.steps)
    rate = learning_rate(config.optimizer, settings.steps)

    def micro_batch_loss(params: Params, batch: Batch, total_weight: Array, key: ScalarKey):
        logits_BSV, aux = forward(model, params, batch, train=True, key=key)
        targets_BS, weight_BS = jnp.asarray(batch.targets_BS), jnp.asarray(batch.weight_BS)
        cross_entropy = weighted_cross_entropy(logits_BSV, targets_BS, weight_BS) / total_weight
        share = jnp.sum(weight_BS) / total_weight
        moe = config.model.moe
        router_loss = 0.0 if aux is None or moe is None else aux_loss(aux, moe)
        return cross_entropy + share * router_loss, (cross_entropy, aux)

    def gradient(params: Params, batch: Batch, key: ScalarKey):
        total_weight = jnp.maximum(jnp.sum(batch.weight_BS), 1.0)
        of_micro_batch = jax.value_and_grad(micro_batch_loss, has_aux=True)
        if settings.accumulate == 1:
            return of_micro_batch(params, batch, total_weight, key)
        rows = jax.tree.map(lambda a: a.reshape(settings.accumulate, -1, *a.shape[1:]), batch)

        def add(total, index_and_rows):
            index, micro_batch = index_and_rows
            part = of_micro_batch(params, micro_batch, total_weight, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, part), None

        micro_batches = (jnp.arange(settings.accumulate), rows)
        shapes = jax.eval_shape(of_micro_batch, params, jax.tree.map(lambda a: a[0], rows), total_weight, key)
        zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(add, zero, micro_batches)[0]

    def train_step(state: TrainState, batch: Batch, key: ScalarKey):
        (loss, (cross_entropy, aux)), gradients = gradient(
            state.params, batch, jax.random.fold_in(key, state.step)
        )
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        go_on = finite & (state.bad_in_a_row < settings.max_bad_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": cross_entropy,
            "learning_rate": rate(state.step - state.skipped),
            "grad_norm": norm,
            **({} if aux is None else summarize(aux)),
        }
        state = TrainState(
            params=_choose(go_on, params, state.params),
            opt_state=_choose(go_on, opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + ~go_on,
            bad_in_a_row=jnp.where(go_on, 0, state.bad_in_a_row + 1),
        )
        return state, metrics | {"skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}

    return train_step


def weighted_cross_entropy(
    logits_BSV: Float[Array, "B S V"], targets_BS: Int[Array, "B S"], weight_BS: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Sum over tokens of weight times -log p(target), in nats and float32; 0 where the weight is 0."""
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV.astype(jnp.float32), targets_BS)
    return jnp.sum(jnp.where(weight_BS == 0, 0.0, nats_BS * weight_BS))


def forward(model: PureModel, params: Params, batch: Batch, *, train: bool, key: ScalarKey | None = None):
    """Run the model over a batch with its segments, positions and mask; returns (logits_BSV, aux)."""
    return model.apply(
        params,
        batch.ids_BS,
        segments_BS=batch.segments_BS,
        positions_BS=batch.positions_BS,
        mask_BS=batch.mask_BS,
        train=train,
        key=key,
    )


def _choose(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
