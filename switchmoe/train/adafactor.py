"""Adafactor for weights that are stacks of matrices: one optimizer for each layer and each expert."""

from collections.abc import Callable

import jax
import optax

from switchmoe.train.weights import stacked_axes


def per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Transform each matrix's gradient on its own, however many of them are stacked in one array.

    `inner` sees one matrix at a time: its state gets the stacking axes (super-blocks, layers, experts) in
    front, and whatever it takes the largest, the mean or the norm of, it takes over that matrix only. The
    result is what as many separate optimizers as there are matrices would give.
    """

    def init(params):
        return jax.tree.map_with_path(
            lambda path, weight: _over_stack(inner.init, stacked_axes(path, weight))(weight), params
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("per_matrix needs the params: call update(updates, state, params).")
        weights, treedef = jax.tree.flatten_with_path(params)
        gradients, states = treedef.flatten_up_to(updates), treedef.flatten_up_to(state)
        results = [
            _over_stack(inner.update, stacked_axes(path, weight))(gradient, own_state, weight)
            for (path, weight), gradient, own_state in zip(weights, gradients, states, strict=True)
        ]
        return tuple(jax.tree.unflatten(treedef, part) for part in zip(*results, strict=True))

    return optax.GradientTransformation(init, update)


def scale_by_adafactor(factor_at_least: int) -> optax.GradientTransformation:
    """Divide each gradient by a factored estimate of its size and multiply it by the size of its matrix.

    Adafactor without momentum: row and column means of squared gradients, decay 1 - t ** -0.8, updates
    clipped to a root mean square of 1 and scaled by the root mean square of the weights (at least 1e-3).
    optax.adafactor alone would factor the two largest dimensions of a stacked array and clip over all of
    it, so that experts and layers would share statistics; here each matrix has its own. A learning rate of
    1e-2 is a usual choice.

    Source: Shazeer & Stern 2018, algorithms 4 and 5 and section 8, https://arxiv.org/abs/1804.04235.
    """
    return per_matrix(
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=factor_at_least),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    )


def _over_stack(function: Callable, axes: int) -> Callable:
    for _ in range(axes):
        function = jax.vmap(function)
    return function
