"""Where a run's arrays lie: all on one device, or on a mesh, weights by name and batches by their rows."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding, SingleDeviceSharding

from switchmoe.data import Batch
from switchmoe.data.pipeline import EvaluationBatches, TrainBatches
from switchmoe.parallel import Layout, stored_as
from switchmoe.shapes import ScalarKey, named_key
from switchmoe.train.config import TrainConfig
from switchmoe.train.model import Params, PureModel
from switchmoe.train.step import TrainState, TrainStep, init_state
from switchmoe.train.weights import stacked_axes


def state_shardings(layout: Layout | None, shapes: TrainState) -> TrainState:
    """Say where each array of a state is stored; without a layout, on the first device.

    A weight is split by its name (`parallel.stored_as`), and so is whatever the optimizer keeps in its shape
    (Adam's moments). What it keeps in another shape (Adafactor's rows and columns) is split over the experts
    alone. Counters and balance biases are whole, frozen weights where they would be if they moved.
    """
    if layout is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: device, shapes)
    named = [*jax.tree.leaves_with_path(shapes.params), *jax.tree.leaves_with_path(shapes.frozen)]
    weights = {_names(path): (path, weight) for path, weight in named}

    def place(path: tuple[Any, ...], part: jax.ShapeDtypeStruct) -> Sharding:
        if _names(path) not in weights:
            return layout.sharding()
        of, weight = weights[_names(path)]
        spec = stored_as(layout, of, weight.ndim)
        if part.shape != weight.shape:
            spec = PartitionSpec(*spec[: stacked_axes(of, weight)])
        return layout.sharding(spec)

    everywhole = jax.tree.map(lambda _: layout.sharding(), shapes)
    return everywhole._replace(
        params=jax.tree.map_with_path(place, shapes.params),
        opt_state=jax.tree.map_with_path(place, shapes.opt_state),
        frozen=jax.tree.map_with_path(place, shapes.frozen),
    )


def abstract_state(config: TrainConfig, model: PureModel) -> TrainState:
    """Give the shapes, types and places of a run's state, without computing it."""
    shapes = jax.eval_shape(lambda: init_state(config, model))
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        shapes,
        state_shardings(model.layout, shapes),
    )


def draw_state(config: TrainConfig, model: PureModel, start: Params | None = None) -> TrainState:
    """Draw the first state of a run, each part on the device that keeps it; the mesh changes no number.

    Weights that are in the tree `start` are not drawn: they are copied, from the host or wherever they lie.
    """
    draw = functools.partial(init_state, config, model)
    if start is not None:
        start = place_weights(model, start)
    if model.layout is None:
        return jax.jit(draw)(start)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, model))
    return jax.jit(draw, out_shardings=places)(start)


def place_weights(model: PureModel, weights: Params) -> Params:
    """Put given weights where `parallel.stored_as` says, in the types that the model keeps them in.

    Every process puts what its own devices hold. The arrays may be the given ones: nothing may be done to
    them.
    """

    def put(path: tuple[Any, ...], weight: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        if model.layout is None:
            return jnp.asarray(weight, like.dtype)
        whole = np.asarray(weight).astype(like.dtype)
        place = model.layout.sharding(stored_as(model.layout, path, whole.ndim))
        return jax.make_array_from_callback(whole.shape, place, lambda part: whole[part])

    def alike(shapes: Params, weights: Params) -> Params:  # there may be adapters too, which are not given
        return {
            name: alike(shapes[name], value) if isinstance(value, dict) else shapes[name]
            for name, value in weights.items()
        }

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map_with_path(put, weights, alike(shapes, weights))


def draw_noise_key(config: TrainConfig, model: PureModel) -> ScalarKey:
    """Derive the key of a run's noise from its seed, known to every device."""

    def draw() -> ScalarKey:
        return named_key(jax.random.key(config.train.seed), "noise")

    return draw() if model.layout is None else jax.jit(draw, out_shardings=model.layout.sharding())()


def jit_step(step: TrainStep, config: TrainConfig, model: PureModel, *, taught: bool = False) -> Any:
    """Compile a run's step when it is first called; the state given to it is used up.

    On a mesh the batch comes from `place_batch`; the metrics are known to every device. Where the step is
    `taught`, it takes the teacher's weights too, from `place_weights`.
    """
    if model.layout is None:
        return jax.jit(step, donate_argnums=0)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(config, model))
    whole = model.layout.sharding()
    inputs = (places, None, whole, None) if taught else (places, None, whole)
    return jax.jit(step, in_shardings=inputs, out_shardings=(places, whole), donate_argnums=0)


def place_batch(
    layout: Layout | None, batches: TrainBatches | EvaluationBatches, index: int, micro_batches: int = 1
) -> Batch:
    """Read one batch onto the devices that work on it; without a layout it stays on the host, as it is.

    A process reads the rows that its own devices hold, and no others. On a mesh with several `micro_batches`
    these are the first dimension, and each of them is split over the devices by its rows.
    """
    if layout is None:
        return batches[index]
    count = batches.batch_size // micro_batches
    spec = layout.batch_spec()
    parts = layout.sharding(spec).addressable_devices_indices_map((count,))

    @functools.cache  # devices along the tensor axis hold the same rows
    def read(start: int, stop: int) -> Batch:
        rows = [
            batches.rows(index, first + start, first + stop)
            for first in range(0, micro_batches * count, count)
        ]
        return rows[0] if micro_batches == 1 else jax.tree.map(lambda *a: np.stack(a), *rows)

    whole = layout.sharding(spec if micro_batches == 1 else PartitionSpec(None, *spec))
    at = int(micro_batches > 1)

    def join(*pieces: jax.Array) -> jax.Array:
        shape = (*pieces[0].shape[:at], count, *pieces[0].shape[at + 1 :])
        return jax.make_array_from_single_device_arrays(shape, whole, list(pieces))

    pieces = []
    for device, where in parts.items():
        assert where is not None  # which jax's annotation admits
        start, stop, _ = where[0].indices(count)
        pieces.append(jax.device_put(read(start, stop), device))
    return jax.tree.map(join, *pieces)


def placed_evaluation(layout: Layout | None, batches: EvaluationBatches) -> Iterable[Batch]:
    """Give the held-out batches in order, on the devices that work on them; the domains stay on the host."""
    if layout is None:
        return batches
    place: Callable[[int], Batch] = functools.partial(place_batch, layout, batches)
    return (place(index)._replace(domain_B=batches.domains(index)) for index in range(len(batches)))


def describe_mesh(layout: Layout | None) -> str | None:
    """Say in a line which devices train, and how they are arranged; None where there is only one."""
    there, processes = jax.device_count(), jax.process_count()
    if layout is None:
        return None if there == 1 else f"one device of the {there} there are"
    sizes = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1)
    of = "" if layout.mesh.size == there else f" of the {there} there are"
    where = "" if processes == 1 else f" in {processes} processes"
    return f"mesh {sizes} on {layout.mesh.size} devices{of}{where}"


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of a weight on the way to it, which its optimizer's state has on the way too."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
