"""The executor over a ragged all-to-all of the platform's own, which no CPU has: done by hand here."""

from tests.devices import run_on_devices

BODY = """
import functools
import jax.numpy as jnp
import switchmoe as sm
from jax import lax
from switchmoe.parallel import Layout, layer, make_mesh, moe, ragged
from tests.core.worlds import assert_trees_close, make_config, make_x

jax.config.update("jax_disable_most_optimizations", True)
calls = []

def by_hand(operand, output, starts, sizes, places, comes, *, axis_name):
    # jax's documentation: from each sender, its rows [start, start + size) stand here from its place on.
    calls.append(operand.shape)
    rows_SRD, start_SN, size_SN, place_SN = (
        lax.all_gather(a, axis_name) for a in (operand, starts, sizes, places)
    )
    me, row_P = lax.axis_index(axis_name), jnp.arange(len(output))
    for sender in range(len(rows_SRD)):
        nth_P = row_P - place_SN[sender, me]
        here_P = (nth_P >= 0) & (nth_P < size_SN[sender, me])
        source_P = jnp.where(here_P, start_SN[sender, me] + nth_P, operand.shape[0])
        sent_PD = rows_SRD[sender].at[source_P].get(mode="fill", fill_value=0)
        output = jnp.where(here_P[:, None], sent_PD, output)
    return output

lax.ragged_all_to_all, layer.is_native = by_hand, lambda platform: True
config = make_config(
    router="top_k", top_k=2, num_experts=8, d_ff=8, dispatch="dropless", expert_dropout=0.2, init_scale=40.0
)
params, x, key = sm.init_moe(jax.random.key(1), config), make_x(1, 16, 6, 4), jax.random.key(7)

def scalar(layer, params, x):
    y, aux = layer(params, x, config, train=True, key=key, mask=x[..., 0] < 1.5)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + sm.aux_loss(aux, config), (y, aux)

def run(layer):
    gradient = jax.grad(functools.partial(scalar, layer), argnums=(0, 1), has_aux=True)
    return jax.block_until_ready(jax.jit(gradient)(params, x))

here = run(sm.moe)
for sizes in (dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2)):
    calls.clear()
    assert_trees_close(run(functools.partial(moe, layout=Layout(make_mesh(**sizes)))), here)
    assert len(calls) == 3, calls  # rows there, where they are from, and back
print("same")
"""


def test_rows_that_travel_by_the_platforms_own_give_the_same():
    assert run_on_devices(8, BODY).splitlines()[-1] == "same"
