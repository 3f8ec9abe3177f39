"""A small model in two states of one training run, and one step from them on any mesh.

In the place of a choice's weight a trace says, here, by how much it was the best and which seat it got.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import switchmoe.layer
from switchmoe.data import batches, load_packed
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.parallel import Layout, make_mesh
from switchmoe.replay import where_tokens_went
from switchmoe.train.gradient import make_gradient
from switchmoe.train.model import pure_model
from switchmoe.train.placement import abstract_state, draw_noise_key, draw_state
from switchmoe.train.step import make_train_step
from tests.core.worlds import assert_close_to_peak
from tests.train.worlds import small_config

ROWS = 8
# A choice may fall differently where the two best experts' probabilities are nearer than this.
MARGIN = 1e-5


def make_config(work: Path, dispatch: str = "gather"):
    """A run of 4 layers, two of them sparse, with seats for an even share only and every noise there is."""
    config = small_config(
        work,
        moe=dict(
            num_experts=8,
            sequences_per_group=1,
            capacity_factor=1.0,
            expert_dropout=0.2,
            jitter=0.1,
            dispatch=dispatch,
        ),
        optimizer=dict(warmup_steps=10),
        batch_size=ROWS,
        steps=200,
    )
    model = dataclasses.replace(config.model, num_layers=4, num_heads=4, num_kv_heads=2, dropout=0.1)
    return dataclasses.replace(config, model=model)


class Moment(NamedTuple):
    """The weights of a run at one step, and what that step reads."""

    params: Any
    batch: Any
    key: Any


def make_moments(config, steps: tuple[int, ...]) -> list[Moment]:
    """What a run on one device, of the real training step, has in hand after so many steps."""
    model, source = pure_model(config.model), batches(load_packed(config.data).train, ROWS, seed=0)
    state, key = draw_state(config, model), draw_noise_key(config, model)
    step = jax.jit(make_train_step(config, model))
    found = []
    for index in range(max(steps) + 1):
        if index in steps:
            assert (int(state.step), int(state.skipped)) == (index, 0)
            params = jax.device_get(state.params)
            found.append(Moment(params, source[index], jax.random.fold_in(key, index)))
        if index < max(steps):
            state, _ = jax.block_until_ready(step(state, source[index], key))
    return found


def _with_margin_and_seat(decision, plan):
    expert_GTK, _, kept_GTK = where_tokens_went(decision, plan)
    best_GT2 = jax.lax.top_k(decision.probs_GTE, 2)[0]
    seat_GTK = plan.slot_GTK if isinstance(plan, SlotPlan) else jnp.zeros_like(expert_GTK)
    return expert_GTK, jnp.stack([best_GT2[..., 0] - best_GT2[..., 1], seat_GTK[..., 0]], -1), kept_GTK


switchmoe.layer.where_tokens_went = _with_margin_and_seat


def one_step(config, layout: Layout | None):
    """`(moment, replay) -> (loss, gradients, trace)`: choices replayed, and the trace of a free pass."""
    model = pure_model(config.model, layout)

    @jax.jit
    def run(params, batch, key_data, replay):
        key = jax.random.wrap_key_data(key_data)
        held = model._replace(apply=functools.partial(model.apply, replay=replay))
        (loss, _), gradients = make_gradient(config, held)(params, {}, batch, key)
        return loss, gradients, free_pass(model, params, batch, key)

    def placed(at, replay):
        if layout is not None:
            places = jax.tree.map(lambda a: a.sharding, abstract_state(config, model)).params
            at = at._replace(params=jax.device_put(at.params, places))
        key_data = np.asarray(jax.random.key_data(at.key))
        return jax.tree.map(_read, jax.block_until_ready(run(at.params, at.batch, key_data, replay)))

    return placed


def _read(a: jax.Array) -> np.ndarray:
    """Copy a whole array to the host, also where other processes have parts of it."""
    return np.asarray(a if a.is_fully_addressable else multihost_utils.process_allgather(a, tiled=True))


def free_pass(model, params, batch, key):
    """The trace of a training pass in which the routers choose."""
    about = dict(segments_BS=batch.segments_BS, positions_BS=batch.positions_BS, mask_BS=batch.mask_BS)
    about = jax.tree.map(jnp.asarray, about)
    run = model.bind(params).trace
    return run(jnp.asarray(batch.ids_BS), train=True, key=key, layout=model.layout, **about)[2]


def on_one_device(config, moments):
    """What each moment gives there, with the choices of a free pass replayed: those choices, and the rest."""
    step = one_step(config, None)
    found = []
    for at in moments:
        anything = np.zeros((2, *at.batch.ids_BS.shape, 1), np.int32)
        replay = step(at, anything)[2].expert_LBSK
        found.append((replay, step(at, replay)))
    return found


def check_step(sizes, config, moments, here, **how) -> None:
    """Hold the step from each moment on a mesh against one device."""
    step = one_step(config, Layout(make_mesh(*sizes), **how))
    for at, (replay, (loss, gradients, trace)) in zip(moments, here, strict=True):
        loss_there, gradients_there, trace_there = step(at, replay)
        np.testing.assert_allclose(loss_there, loss, rtol=1e-6)
        worst = 0.0
        for (path, a), b in zip(
            jax.tree.leaves_with_path(gradients_there), jax.tree.leaves(gradients), strict=True
        ):
            assert np.abs(b).max() > 0, path
            assert_close_to_peak(a, b, 1e-5, f"{sizes} {how} {jax.tree_util.keystr(path)}")
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
        compared, flipped = compare_traces(trace_there, trace)
        print(*sizes, how["executor"], f"{abs(loss_there / loss - 1):.1e} {worst:.1e}", compared, flipped)


def check_meshes(work: Path, ways: dict[str, list[tuple[tuple[int, ...], str]]]) -> None:
    """Do so from steps 0 and 100 of a run, for each dispatch on meshes with an executor each."""
    config = make_config(work)
    moments = make_moments(config, (0, 100))
    for dispatch, tries in ways.items():
        config = make_config(work, dispatch)
        here = on_one_device(config, moments)
        for _, (_, _, trace) in here:
            assert dispatch == "dropless" or 0.2 < trace.kept_LBSK.mean() < 0.9
        for sizes, executor in tries:
            check_step(sizes, config, moments, here, executor=executor)


def compare_traces(there, here) -> tuple[int, int]:
    """Hold a free pass against another; returns how many choices were compared, and how many differ.

    A sequence is a group. Where a choice in it fell differently, which only happens between two experts that
    are almost equally good, its seats may differ, and what comes in its later layers is not compared.
    """
    same_B = np.ones(here.expert_LBSK.shape[1], bool)
    compared = flipped = 0
    for layer in range(len(here.expert_LBSK)):
        differs_BS = there.expert_LBSK[layer, ..., 0] != here.expert_LBSK[layer, ..., 0]
        margin_BS = here.weight_LBSK[layer, ..., 0]
        assert (margin_BS[same_B][differs_BS[same_B]] <= MARGIN).all()
        compared += differs_BS[same_B].size
        flipped += int(differs_BS[same_B].sum())
        same_B &= ~differs_BS.any(axis=1)
        for part in ("kept_LBSK", "weight_LBSK"):
            a_BS, b_BS = (getattr(trace, part)[layer, ..., -1][same_B] for trace in (there, here))
            np.testing.assert_array_equal(a_BS, b_BS)
    return compared, flipped
