"""On 8 devices: dropless rows that travel into buffers with room for all of them, and for fewer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import switchmoe as sm
from switchmoe.parallel import Layout, make_mesh
from switchmoe.parallel import moe_with_trace as moe_on_mesh
from tests.core.worlds import assert_close_to_peak, assert_trees_close
from tests.parallel.worlds import D_FF, D_MODEL, EXPERTS, ROWS, TOKENS, params_of

SIZES = dict(d_model=D_MODEL, d_ff=D_FF, num_experts=EXPERTS, router="top_k", top_k=2)
# Without losses on the router, so that its gradient comes from the choices that were served.
SORTED = sm.MoEConfig(**SIZES, dispatch="dropless", gated=True, expert_dropout=0.2, balance_coef=0.0)
K = SORTED.top_k
RNG = np.random.default_rng(0)
X_BSD = RNG.standard_normal((ROWS, TOKENS, D_MODEL)).astype(np.float32)
MASK_BS = RNG.random((ROWS, TOKENS)) < 0.8
MASK_BS[2:4] = False  # nothing comes from the device of these rows
# Where tokens go; expert E is a choice that is not used.
CHOICES = {
    "one expert": np.broadcast_to([EXPERTS - 1, EXPERTS], (ROWS, TOKENS, K)),
    "one device": np.broadcast_to([2, 3], (ROWS, TOKENS, K)),
    "anywhere": RNG.permuted(np.tile(np.arange(EXPERTS + 1), (ROWS, TOKENS, 1)), axis=-1)[..., :K],
}


def run(layout, params, x_BSD, replay):
    """A training pass with gradients; (gradients to weights and rows, (output, sums, where tokens went))."""
    layer = sm.moe_with_trace if layout is None else functools.partial(moe_on_mesh, layout=layout)

    def scalar(params, x_BSD):
        given = dict(key=jax.random.key(3), mask=jnp.asarray(MASK_BS), replay=replay)
        y_BSD, aux, trace = layer(params, x_BSD, SORTED, train=True, **given)
        wave = jnp.cos(jnp.arange(y_BSD.size, dtype=jnp.float32)).reshape(y_BSD.shape)
        return jnp.sum(y_BSD * wave), (y_BSD, aux, trace)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x_BSD)


@functools.cache
def compiled(sizes, factor):
    how = dict(executor="ragged_all_to_all", ragged_buffer_factor=factor)
    layout = None if sizes is None else Layout(make_mesh(*sizes), **how)
    return jax.jit(functools.partial(run, layout))


def ask(sizes, choices, factor=None):
    replay = CHOICES[choices].astype(np.int32)
    return jax.device_get(jax.block_until_ready(compiled(sizes, factor)(params_of(SORTED), X_BSD, replay)))


def check_room_for_all(sizes):
    """By default nothing is ever lost, not even where every token wants the same expert."""
    for choices in CHOICES:
        (gradients, (y_BSD, aux, trace)), here = ask(sizes, choices), ask(None, choices)
        assert_trees_close((gradients, y_BSD, aux), (here[0], *here[1][:2]))
        assert aux.dropped == 0 and aux.kept_E.sum() == aux.choices
        np.testing.assert_array_equal(trace.kept_SK, here[1][2].kept_SK)
        print("all", *sizes, choices)


def who_fits(sizes, choices, factor):
    """Which choices find room, worked out one row at a time: a device's buffer takes rows as they come.

    They come from the devices along the expert axis in turn, from each expert by expert, then in the order of
    its own tokens. Devices of other places on the other axes have buffers of their own.
    """
    data, fsdp, expert, _ = sizes
    rows = ROWS // (data * fsdp * expert)
    room = min(expert, factor) * rows * TOKENS * K
    kept_BSK = np.zeros((ROWS, TOKENS, K), bool)
    for block in range(data * fsdp):
        for receiver in range(expert):
            filled = 0
            mine = range(receiver * EXPERTS // expert, (receiver + 1) * EXPERTS // expert)
            for sender in range(expert):
                first = (block * expert + sender) * rows
                for name in mine:
                    for b, s, k in np.ndindex(rows, TOKENS, K):
                        if CHOICES[choices][first + b, s, k] == name and MASK_BS[first + b, s]:
                            kept_BSK[first + b, s, k] = filled < room
                            filled += 1
    return kept_BSK


def check_too_little_room(sizes, factor, choices):
    """What finds no room is counted, gives 0, and leaves everything else as it was."""
    gradients, (y_BSD, aux, trace) = ask(sizes, choices, factor)
    kept_BSK = who_fits(sizes, choices, factor)
    wanted_BSK = (CHOICES[choices] < EXPERTS) & MASK_BS[..., None]
    lost = wanted_BSK.sum() - kept_BSK.sum()
    assert 0 < lost < wanted_BSK.sum()
    np.testing.assert_array_equal(trace.kept_SK, kept_BSK)
    assert (aux.dropped, aux.choices) == (lost, wanted_BSK.sum())
    kept_E = np.bincount(CHOICES[choices][kept_BSK], minlength=EXPERTS)
    np.testing.assert_array_equal(aux.kept_E, kept_E)
    np.testing.assert_array_equal(aux.load_E, np.bincount(CHOICES[choices][wanted_BSK], minlength=EXPERTS))
    assert aux.unserved == (MASK_BS & ~kept_BSK.any(-1)).sum()
    assert (y_BSD[~kept_BSK.any(-1)] == 0).all() and not (y_BSD[kept_BSK.any(-1)] == 0).all(-1).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    print("some", *sizes, choices, int(lost))
    return kept_BSK, gradients, y_BSD


def check_against_those_that_fit(sizes, factor, choices):
    """Output and gradients are those of one device where only the choices that found room are made.

    The choices are left out by naming expert E, so the load differs; the noise is by choice and does not.
    """
    kept_BSK, gradients, y_BSD = check_too_little_room(sizes, factor, choices)
    CHOICES["those"] = np.where(kept_BSK, CHOICES[choices], EXPERTS)
    gradients_here, (y_here, *_) = ask(None, "those")
    assert_close_to_peak(y_BSD, y_here, name="output")
    assert_trees_close(gradients, gradients_here)


def check(sizes):
    """All of that on one mesh."""
    check_room_for_all(sizes)
    check_against_those_that_fit(sizes, 0.5, "anywhere")
    if sizes[2] > 2:  # with two devices there is room for either
        check_too_little_room(sizes, 0.5, "one device")
        check_too_little_room(sizes, 0.5, "one expert")
