"""The MoE layer over a mesh: the same function as on one device, inside one `jax.shard_map`."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

import switchmoe.layer as one_device
from switchmoe.config import MoEConfig
from switchmoe.dispatching.varying import varying_axes
from switchmoe.execution import Shard
from switchmoe.inputs import check_inputs
from switchmoe.layer import MoEParams
from switchmoe.parallel.checks import check_layout, check_weights, choose_executor
from switchmoe.parallel.executors import Place, make_executor
from switchmoe.parallel.layout import Layout
from switchmoe.parallel.ragged import is_native
from switchmoe.parallel.weights import GATHERED, dimensions
from switchmoe.replay import Trace
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey


def moe(
    params: MoEParams,
    x: Float[Array, "*B S D"],
    config: MoEConfig,
    *,
    layout: Layout | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **inputs: Any,
) -> tuple[Float[Array, "*B S D"], MoEAux]:
    """Send each token through its experts, wherever on the mesh these are, and return what they say.

    Outputs, sums, dropped tokens, noise and gradients are those of `switchmoe.moe` on one device, whose
    arguments `inputs` are, up to the rounding of sums: a group of sequences is always on one device, and
    capacity lives inside a group. Rows are split over the axes of `Rules.rows`, experts over that of
    `Rules.experts`, whatever placement the arguments come with.

    Args:
      params, x, config: as for `switchmoe.moe`.
      layout: the mesh, the rules and the way tokens travel.
      mesh: instead, a mesh alone, with everything else at its default.
      inputs: train, key, mask, token_ids, bias, replay.

    Raises:
      ValueError: one sentence, before any computation, if shapes do not divide over the mesh or the executor
        does not suit the config, and whatever `switchmoe.moe` raises.
    """
    y, aux, _ = moe_with_trace(params, x, config, layout=layout, mesh=mesh, **inputs)
    return y, aux


def moe_with_trace(
    params: MoEParams,
    x: Float[Array, "*B S D"],
    config: MoEConfig,
    *,
    layout: Layout | None = None,
    mesh: jax.sharding.Mesh | None = None,
    train: bool = False,
    key: ScalarKey | None = None,
    mask: Bool[Array, "*B S"] | None = None,
    token_ids: Int[Array, "*B S"] | None = None,
    bias: Float[Array, " E"] | None = None,
    replay: Int[Array, "*B S K"] | None = None,
) -> tuple[Float[Array, "*B S D"], MoEAux, Trace]:
    """Do what `moe` does, and say where each token went."""
    if (layout is None) == (mesh is None):
        raise ValueError("parallel.moe needs a mesh or a layout that has one, and not both.")
    layout = layout or Layout(mesh)  # pyright: ignore[reportArgumentType]
    by_row: dict[str, Any] = dict(mask=mask, token_ids=token_ids, replay=replay)
    check_inputs(params, x, config, train=train, key=key, bias=bias, **by_row)
    if x.ndim != 3 and AxisType.Explicit in layout.mesh.axis_types:
        raise ValueError(
            f"x has {x.ndim} dimensions, but a mesh with explicit axes can't reshape it; give it as [rows, "
            "sequence, features], or take a mesh with automatic axes."
        )
    rows = math.prod(x.shape[:-2])
    if x.ndim == 2:  # one group, whatever the config says
        if layout.row_axes:
            raise ValueError(
                f"x has shape {x.shape}, which is one group, and a group can't be split over devices; give x "
                "as [rows, sequence, features]."
            )
        config = dataclasses.replace(config, sequences_per_group=1)
    check_layout(config, layout, rows=rows)
    check_weights(params, layout)
    if layout.mesh.size == 1:
        return one_device.moe_with_trace(params, x, config, train=train, key=key, bias=bias, **by_row)

    return _run(params, x, by_row, bias, key, config=config, layout=layout, train=train)


# Compiled once outside jit too; inside it becomes part of the program around it.
@functools.partial(jax.jit, static_argnames=("config", "layout", "train"), inline=True)
def _run(params, x, by_row, bias, key, *, config: MoEConfig, layout: Layout, train: bool):
    """Split the rows over the devices, and let each do its part of the layer."""
    rows = math.prod(x.shape[:-2])

    def body(params, x_BSD, by_row, bias, key):
        params = _gather_weights(params, layout, x_BSD.dtype)
        shard = _make_shard(config, layout, len(x_BSD) // config.sequences_per_group)
        y_BSD, aux, trace = one_device.moe_with_trace(
            params, x_BSD, config, train=train, key=key, bias=bias, shard=shard, **by_row
        )
        hidden = layout.used(layout.rules.hidden)
        return (lax.psum(y_BSD, hidden) if hidden else y_BSD), aux, trace

    split, whole = layout.batch_spec(), PartitionSpec()
    specs = (_weight_specs(params, layout), split, split, whole, whole)
    flat = jax.tree.map(lambda a: a.reshape(rows, *a.shape[x.ndim - 2 :]), by_row)
    arguments = (params, x.reshape(rows, *x.shape[-2:]), flat, bias, key)
    run = jax.shard_map(body, mesh=layout.mesh, in_specs=specs, out_specs=(split, whole, split))
    y_BSD, aux, trace = run(*_place(arguments, specs, layout))
    trace = jax.tree.map(lambda a: a.reshape(*x.shape[:-1], a.shape[-1]), trace)
    return y_BSD.reshape(x.shape), aux, trace


def _make_shard(config: MoEConfig, layout: Layout, groups: int) -> Shard:
    """Tell the layer which part of all it sees, inside `jax.shard_map` with so many groups a device."""
    rules = layout.rules
    shard = Shard(checked=True)
    if layout.row_axes:
        shard = shard._replace(
            first_group=lax.axis_index(layout.row_axes) * groups,
            sum_across=lambda aux: lax.psum(aux, layout.row_axes),
        )
    hidden = layout.used(rules.hidden)
    if hidden:
        shard = shard._replace(
            part_of_F=(lax.axis_index(hidden), layout.size(hidden)),
            # Here the gradients of the parts are summed, in tokens; deeper inside it would be in seats.
            to_experts=lambda x_GTD: _vary(x_GTD, hidden),
        )
    if not layout.used(rules.experts):
        return shard
    axis = layout.used(rules.experts)[0]
    devices = layout.size(axis)
    # What a device's groups are counted from, for each device along the axis: the others' coordinates stay.
    stride = layout.size(layout.row_axes[layout.row_axes.index(axis) + 1 :])
    first_S = shard.first_group + (jnp.arange(devices) - lax.axis_index(axis)) * stride * groups
    place = Place(
        axis=axis,
        devices=devices,
        num_experts=config.num_experts // devices,
        group_SG=first_S[:, None] + jnp.arange(groups),
        dispatch=config.dispatch,
        chunks=layout.chunks,
        room=layout.ragged_buffer_factor,
        native=is_native(layout.platform) if config.dispatch == "dropless" else False,
    )
    execute, admit = make_executor(choose_executor(config, layout), place)
    return shard._replace(execute=execute, admit=admit)


def _weight_specs(params: MoEParams, layout: Layout) -> MoEParams:
    """Say how a layer's weights are stored: the router's whole, a shared expert not split by experts."""
    return MoEParams(
        jax.tree.map(lambda weight: PartitionSpec(), params.router),
        jax.tree.map_with_path(lambda path, w: layout.weight_spec(dimensions(path)), params.experts),
        jax.tree.map_with_path(lambda path, w: layout.weight_spec(dimensions(path)[1:], 1), params.shared),
    )


def _gather_weights(params: MoEParams, layout: Layout, dtype: jnp.dtype) -> MoEParams:
    """Put together the model features of every expert's weights, which are stored in parts.

    The weights also start to vary here over the devices that have other tokens: where that happens, their
    gradient is summed over these, and deeper inside it would be once an expert.
    """
    over = layout.used(layout.rules.model)

    def gather(path: tuple[Any, ...], weight: Array) -> Array:
        if not over:
            return _vary(weight, layout.row_axes)
        # Varying first, so that the gradient is cut into parts before it is summed over the other axes.
        weight = _vary(weight.astype(dtype), layout.row_axes)
        at = dimensions(path).index("D")
        return checkpoint_name(lax.all_gather(weight, over[0], axis=at, tiled=True), GATHERED)

    experts, shared = jax.tree.map_with_path(gather, (params.experts, params.shared))
    return MoEParams(params.router, experts, shared)


def _vary(x: Array, axes: tuple[str, ...]) -> Array:
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def _place(arguments: tuple, specs: tuple, layout: Layout) -> tuple:
    """Put the arguments where the shard_map wants them, which jax does by itself unless axes are explicit."""
    if AxisType.Explicit not in layout.mesh.axis_types:
        return arguments

    def put(spec, tree):
        return jax.tree.map(lambda a: jax.reshard(a, layout.sharding(spec)), tree)

    return jax.tree.map(put, specs, arguments, is_leaf=lambda part: isinstance(part, PartitionSpec))
