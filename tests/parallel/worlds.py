"""A layer on a mesh beside the same layer on one device: the cases, the meshes, and what has to be equal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import switchmoe as sm
from switchmoe.parallel import Layout, make_mesh
from switchmoe.parallel import moe_with_trace as moe_on_mesh
from switchmoe.routing import make_router
from tests.core.worlds import assert_close_to_peak

ROWS, TOKENS, D_MODEL, D_FF, EXPERTS = 16, 8, 8, 12, 8

# Sizes of the axes data, fsdp, expert and tensor.
MESHES = [
    (8, 1, 1, 1),
    (4, 1, 2, 1),
    (2, 1, 4, 1),
    (1, 1, 8, 1),
    (2, 2, 2, 1),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
]
# How a script for `run_on_devices` starts. Its small programs run once, so they are compiled quickly, ...
SETUP = """
jax.config.update("jax_disable_most_optimizations", True)
from tests.parallel.layer_cases import *
from tests.parallel.worlds import *
"""
# ... and in half the time by the older of two ways to make code for a CPU, which later versions have no more.
OLDER = jax.__version_info__[:2] == (0, 10)
QUICKLY = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if OLDER else {}

# What a router has to be told to be tried with two experts a token, where it can be.
ROUTER_OPTIONS = {
    "switch": {},
    "base": {},
    "sigmoid": dict(top_k=2, renormalize=True, weight_scale=2.5, expert_groups=4, groups_per_token=2),
    "soft_moe": dict(slots_per_expert=2),
    "soft": dict(top_k=EXPERTS),
    "noisy_top_k": dict(top_k=2, load_coef=0.02),
}
ONLY_SEATS = ("expert_choice", "soft_moe")
NOISE = dict(jitter=0.1, input_dropout=0.2)
LOSSES = dict(balance_coef=0.3, z_coef=0.1, sequence_balance_coef=0.2, importance_coef=0.4)


class Case(NamedTuple):
    """A layer and a way of its tokens over a mesh.

    Attributes:
      config: the layer.
      how: the fields of a Layout beside its mesh and rules.
      replays: whether experts are given instead of chosen.
      dtype: of the activations.
    """

    config: sm.MoEConfig
    how: tuple[tuple[str, Any], ...] = ()
    replays: bool = False
    dtype: str = "float32"


def make_case(router: str, executor=None, *, replays=False, dtype="float32", how=None, **changes) -> Case:
    """A layer with everything on that its router reads: noise, losses, and fewer seats than choices."""
    sizes = dict(d_model=D_MODEL, d_ff=D_FF, num_experts=EXPERTS, router=router, capacity_factor=0.5)
    own = ROUTER_OPTIONS.get(router, dict(top_k=2))
    config = sm.MoEConfig(**(sizes | LOSSES | own | dict(expert_dropout=0.2) | changes))
    how = (how or {}) | dict(executor=executor)
    return Case(_with_noise(config), tuple(how.items()), replays, dtype)


def _with_noise(config: sm.MoEConfig) -> sm.MoEConfig:
    noisy = sm.MoEConfig(**(vars(config) | NOISE))
    try:
        make_router(noisy)
    except ValueError:  # it reads none
        return config
    return noisy


@functools.cache
def params_of(config: sm.MoEConfig, seed: int = 1):
    """Weights large enough that the router has opinions and every activation bends; made up, not drawn."""
    shapes = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.7 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@functools.cache
def inputs_of(case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows, NaN where they are masked, and all the other arguments; two rows are masked as a whole."""
    rng = np.random.default_rng(2)
    shape = (ROWS, TOKENS)
    x_BSD = rng.standard_normal((*shape, D_MODEL)).astype(np.float32)
    mask_BS = rng.random(shape) < 0.9
    mask_BS[4:6] = False
    x_BSD[~mask_BS] = np.nan
    given = dict(
        key=jax.random.key(7),
        mask=mask_BS,
        token_ids=rng.integers(0, 50, shape).astype(np.int32),
        bias=(0.3 * rng.standard_normal(EXPERTS)).astype(np.float32),
    )
    if case.replays:  # also a choice that is not used
        given["replay"] = rng.integers(0, EXPERTS + 1, (*shape, case.config.top_k)).astype(np.int32)
    return x_BSD.astype(case.dtype), given


def with_gradient(case: Case, layout: Layout | None, params, x_BSD, given):
    """One training pass: the gradients to weights and rows, and (output, sums, where tokens went)."""
    run = sm.moe_with_trace if layout is None else functools.partial(moe_on_mesh, layout=layout)

    def scalar(params, x_BSD):
        y_BSD, aux, trace = run(params, x_BSD, case.config, train=True, **given)
        wave = jnp.cos(jnp.arange(y_BSD.size, dtype=jnp.float32)).reshape(y_BSD.shape)
        return jnp.sum(y_BSD * wave) + sm.aux_loss(aux, case.config), (y_BSD, aux, trace)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x_BSD)


def run_cases(cases: list[Case], sizes: tuple[int, ...] | None, axis_types="auto"):
    """Run all cases on a mesh, or on one device if `sizes` is None, in one program."""
    mesh = None if sizes is None else make_mesh(*sizes, axis_types=axis_types)

    def layout(case):
        return None if mesh is None else Layout(mesh, **dict(case.how))

    @jax.jit
    def everything(arguments):
        return [with_gradient(case, layout(case), *each) for case, each in zip(cases, arguments, strict=True)]

    arguments = [(params_of(case.config), *inputs_of(case)) for case in cases]
    return jax.device_get(jax.block_until_ready(everything(arguments)))


def check_equal(case: Case, there, here, tolerance: float = 1e-5) -> None:
    """Hold a pass on a mesh against one on one device, every array relative to its peak."""
    (gradients, (y, aux, trace)), (gradients_here, (y_here, aux_here, trace_here)) = there, here
    np.testing.assert_array_equal(trace.expert_SK, trace_here.expert_SK)
    np.testing.assert_array_equal(trace.kept_SK, trace_here.kept_SK)
    pairs = dict(y=(y, y_here), aux=(aux, aux_here), weight=(trace.weight_SK, trace_here.weight_SK))
    for name, (one, other) in (pairs | dict(gradient=(gradients, gradients_here))).items():
        for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (one, other)), strict=True):
            assert_close_to_peak(a, b, tolerance, f"{case}: {name}{jax.tree_util.keystr(path)}")


def compare(cases: dict[tuple[int, ...], list[Case]], axis_types="auto", tolerance: float = 1e-5) -> None:
    """Hold every case on its meshes against one device, which does each layer once; prints what was equal."""
    layers = {case._replace(how=()): case for each in cases.values() for case in each}
    here = dict(zip(layers, run_cases(list(layers), None), strict=True))
    for layer, case in layers.items():
        check_telling(case, here[layer])
    for sizes, each in cases.items():
        for case, there in zip(each, run_cases(each, sizes, axis_types), strict=True):
            check_equal(case, there, here[case._replace(how=())], tolerance)
            config, how = case.config, dict(case.how)
            print(*sizes, config.router, config.dispatch, how["executor"])


def check_telling(case: Case, here) -> None:
    """Make sure that a case shows something: nothing is NaN or 0, tokens are masked, and some are dropped."""
    gradients, (y, aux, _) = here
    blind = case.config.router in ("hash", "random", "balanced")
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), (case, path)
        assert np.abs(gradient).max() > 1e-3 or blind, (case, path)
    assert np.isfinite(np.asarray(y, np.float32)).all() and 0 < aux.tokens < ROWS * TOKENS
    if case.config.dispatch != "dropless" and case.config.router not in (*ONLY_SEATS, "base", "balanced"):
        assert np.any(aux.kept_E != aux.load_E), f"{case}: every choice got its seat"
