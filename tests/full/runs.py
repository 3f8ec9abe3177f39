"""Runs of 200 steps of the small model: on one device, from weights next to its, and on meshes."""

import functools
from pathlib import Path

import jax
import numpy as np

from switchmoe.data import batches, load_packed
from switchmoe.parallel import Layout, make_mesh
from switchmoe.train.model import pure_model
from switchmoe.train.placement import abstract_state, draw_noise_key, draw_state
from switchmoe.train.step import make_train_step
from tests.parallel.model_worlds import ROWS, free_pass, make_config

STEPS = 200


@functools.cache  # so that runs which differ in numbers alone compile once
def make_step(config, sizes, replays: bool, records: bool):
    """The model on a mesh (one device if `sizes` is None), and its training step."""
    model = pure_model(config.model, None if sizes is None else Layout(make_mesh(*sizes)))

    @jax.jit
    def step(state, batch, key, replay):
        held, chosen = model, None
        if replays:
            held = model._replace(apply=functools.partial(model.apply, replay=replay))
        if records:
            chosen = free_pass(model, state.params, batch, jax.random.fold_in(key, state.step)).expert_LBSK
        state, metrics = make_train_step(config, held)(state, batch, key)
        return state, metrics["loss"], chosen

    return model, step


def train(config, sizes=None, *, replay=None, first=None, key=None, record=False):
    """Train from a first state and a key, the run's own unless given; returns the losses, and the choices.

    With `replay`, step by step the choices of another run take the place of the routers'.
    """
    model, step = make_step(config, sizes, replay is not None, record)
    source = batches(load_packed(config.data).train, ROWS, seed=0)
    key = draw_noise_key(config, pure_model(config.model)) if key is None else key
    state = jax.device_get(draw_state(config, pure_model(config.model))) if first is None else first
    if sizes is not None:
        state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, abstract_state(config, model)))
    losses, choices = [], []
    for index in range(STEPS):
        held = None if replay is None else replay[index]
        state, loss, chosen = jax.block_until_ready(step(state, source[index], key, held))
        losses.append(float(loss))
        choices.append(jax.device_get(chosen))
    return np.array(losses), choices


def check_replayed(work: Path, meshes) -> None:
    """With the choices of the run on one device, 200 steps on a mesh have its losses."""
    config = make_config(work)
    losses, choices = train(config, record=True)
    assert losses[-20:].mean() < losses[:20].mean() - 0.5, "it must learn something"
    for sizes in meshes:
        there, _ = train(config, sizes, replay=choices)
        print("replayed", *sizes, np.abs(there - losses).max(), flush=True)


def nearby(state, seed: int):
    """The same state with every weight moved by about a ten-millionth of itself."""
    rng = np.random.default_rng(seed)
    noise = lambda a: (a * (1 + 1e-7 * rng.standard_normal(a.shape))).astype(np.float32)  # noqa: E731
    return state._replace(params=jax.tree.map(noise, jax.device_get(state.params)))


def furthest(one, other) -> float:
    """How far two curves get apart at one step of theirs."""
    return float(np.abs(one - other).max())


def check_free(work: Path, meshes, neighbours: int) -> None:
    """Print how far apart a run on one device and its neighbours get, and how near other runs are to them.

    Which of two almost equally good experts a token chooses is up to rounding, and from there two runs go
    their own ways. So a curve can't be held against another one: what is compared is its distance to the
    nearest curve of the neighbourhood, with the largest distance in there. A run with other noise shows
    that this says something.
    """
    config = make_config(work)
    first = jax.device_get(draw_state(config, pure_model(config.model)))
    near = [train(config)[0]]
    near += [train(config, first=nearby(first, seed))[0] for seed in range(neighbours)]
    print("spread", max(furthest(one, other) for one in near for other in near), flush=True)
    others = {"other noise": train(config, key=jax.random.key(99))[0]}
    others |= {f"mesh {'x'.join(map(str, sizes))}": train(config, sizes)[0] for sizes in meshes}
    for name, losses in others.items():
        print(name, min(furthest(losses, one) for one in near), flush=True)
