"""One step of training: a batch in, a better state out, and what there is to say about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchmoe.data import Batch
from switchmoe.routing import summarize, update_bias
from switchmoe.shapes import Array, Float, Int, ScalarKey, named_key
from switchmoe.train.config import TrainConfig
from switchmoe.train.gradient import make_gradient
from switchmoe.train.model import Params, PureModel, join
from switchmoe.train.optimizer import make_optimizer
from switchmoe.train.parts import split_weights
from switchmoe.train.schedule import learning_rate


class TrainState(NamedTuple):
    """What a run carries from step to step; all of it is saved, so a run that starts again continues exactly.

    Attributes:
      params: the weights that the optimizer changes, nested dictionaries of arrays.
      opt_state: the optimizer's, from optax.
      step: steps taken, skipped ones too; it is also the place in the data.
      skipped: steps whose loss or gradient was not finite.
      bad_in_a_row: how many of the last steps were skipped.
      biases: the balance biases of the sparse layers, which no optimizer sees; {} if they have none.
      frozen: the weights that `tune.part` leaves alone; {} for none.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]
    biases: Params = {}
    frozen: Params = {}

    def everything(self) -> Params:
        """All that the model reads, in one tree."""
        return join(join(self.params, self.frozen), self.biases)


TrainStep = Callable[..., tuple[TrainState, dict[str, Array]]]


def init_state(config: TrainConfig, model: PureModel, start: Params | None = None) -> TrainState:
    """Draw the first weights from the run's seed and give the optimizer an empty history.

    What the tree `start` has is not drawn, but copied.
    """
    everything = model.init(named_key(jax.random.key(config.train.seed), "init"))
    if start is not None:
        everything = join(everything, jax.tree.map(jnp.copy, start))
    params, frozen, biases = split_weights(everything, config.tune.part)
    # A buffer of its own for each counter: the step donates them, and none can be donated twice.
    step, skipped, bad_in_a_row = (jnp.array(0, jnp.int32) for _ in range(3))
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(params, opt_state, step, skipped, bad_in_a_row, biases, frozen)


def make_train_step(config: TrainConfig, model: PureModel, teacher: PureModel | None = None) -> TrainStep:
    """Build the pure function `(state, batch, key, taught=None) -> (state, metrics)` of a run.

    The loss and its gradient are those of `make_gradient`; `taught` are the weights of the `teacher`, if
    there is one. `key` is the run's; the noise of a step comes from it and `state.step` alone. With
    `bias_step` each layer's balance bias then moves by one step, on the load of all the step's tokens.

    A loss or gradient norm that is not finite leaves weights, biases and optimizer as they were; the step
    counts in `step`, `skipped` and `bad_in_a_row`. Once `max_bad_steps` came in a row no update happens any
    more, so whenever the host looks, it finds the state as it was when the limit was reached.
    """
    settings, optimizer = config.train, make_optimizer(config.optimizer, config.train.steps)
    rate = learning_rate(config.optimizer, settings.steps)
    gradient = make_gradient(config, model, teacher)

    def train_step(state: TrainState, batch: Batch, key: ScalarKey, taught: Params | None = None):
        beside, step_key = join(state.frozen, state.biases), jax.random.fold_in(key, state.step)
        (loss, (cross_entropy, aux)), gradients = gradient(state.params, beside, batch, step_key, taught)
        # The norm is to be taken before the update, whose branch would draw it in.
        gradients, norm = jax.lax.optimization_barrier((gradients, optax.global_norm(gradients)))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        go_on = finite & (state.bad_in_a_row < settings.max_bad_steps)
        metrics = {
            "loss": cross_entropy,
            "learning_rate": rate(state.step - state.skipped),
            "grad_norm": norm,
        }
        if aux is not None and config.model.moe is not None:
            metrics |= summarize(aux) | {"tokens_routed": aux.tokens, "choices": aux.choices}

        def update() -> Any:
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, norm=norm)
            biases = state.biases
            if aux is not None and config.model.moe is not None:
                biases = _move_biases(biases, aux.load_E, config.model.moe.bias_step)
            return optax.apply_updates(state.params, updates), opt_state, biases

        old = (state.params, state.opt_state, state.biases)
        # A CPU would have old and new in memory at once for a choice, which takes three times as long.
        params, opt_state, biases = jax.lax.platform_dependent(
            cpu=lambda: jax.lax.cond(go_on, update, lambda: old),
            default=lambda: jax.tree.map(lambda a, b: jnp.where(go_on, a, b), update(), old),
        )
        new = TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + ~go_on,
            bad_in_a_row=jnp.where(go_on, 0, state.bad_in_a_row + 1),
            biases=biases,
            frozen=state.frozen,
        )
        return new, metrics | {"skipped": new.skipped, "bad_in_a_row": new.bad_in_a_row}

    return train_step


def _move_biases(biases: Params, load_LE: Float[Array, "L E"], step: float) -> Params:
    """Move the biases of all sparse layers: one leaf a stack of layers, in the order of the sums in aux."""
    leaves = jax.tree.leaves_with_path(biases)
    leaves.sort(key=lambda leaf: leaf[0][0].key != "encoder")  # whose layers come first
    moved, first = {}, 0
    for path, bias_LE in leaves:
        own_LE = load_LE[first : first + len(bias_LE)]
        moved[path], first = update_bias(bias_LE, own_LE, step), first + len(bias_LE)
    return jax.tree.map_with_path(lambda path, _: moved[path], biases)
