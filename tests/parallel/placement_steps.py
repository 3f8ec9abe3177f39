"""On 8 devices: the layer whatever placement its arguments come with, and inside jax's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import switchmoe as sm
from switchmoe.parallel import Layout, make_mesh, moe
from tests.core.worlds import assert_trees_close
from tests.parallel.worlds import D_FF, D_MODEL, EXPERTS, ROWS, TOKENS, params_of

jax.config.update("jax_disable_most_optimizations", True)
SIZES = dict(d_model=D_MODEL, d_ff=D_FF, num_experts=EXPERTS, capacity_factor=1.0, z_coef=0.1)
SEATS = sm.MoEConfig(**SIZES, jitter=0.1)
SORTED = sm.MoEConfig(**SIZES, dispatch="dropless")
X_BSD = np.random.default_rng(0).standard_normal((ROWS, TOKENS, D_MODEL)).astype(np.float32)
KEY = jax.random.key(3)


def with_gradient(config, params, x_BSD, layout=None, mesh=None):
    """A training pass: gradients to weights and rows, and (output, sums)."""
    where = dict(layout=layout, mesh=mesh)
    run = sm.moe if where == dict(layout=None, mesh=None) else functools.partial(moe, **where)

    def scalar(params, x_BSD):
        y_BSD, aux = run(params, x_BSD, config, train=True, key=KEY)
        wave = jnp.cos(jnp.arange(y_BSD.size, dtype=jnp.float32)).reshape(y_BSD.shape)
        return jnp.sum(y_BSD * wave) + sm.aux_loss(aux, config), (y_BSD, aux)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x_BSD)


def on_one_device(config):
    found = jax.jit(functools.partial(with_gradient, config))(params_of(config), X_BSD)
    aux = found[1][1]
    assert config.dispatch == "dropless" or 0.05 < aux.dropped / aux.tokens < 0.9
    return jax.device_get(found)


HERE = {config: on_one_device(config) for config in (SEATS, SORTED)}


def check_placements(axis_types):
    """Rows in the wrong place give the right result: no part is taken for the whole, or counted twice."""
    mesh = make_mesh(2, 1, 4, 1, axis_types=axis_types)
    whole = NamedSharding(mesh, PartitionSpec())
    tries = [
        (PartitionSpec("data"), "all_to_all", SEATS),  # over the experts' axis everywhere the same
        (PartitionSpec("data"), "ragged_all_to_all", SORTED),
        (PartitionSpec(), "all_gather", SEATS),
        (PartitionSpec(("expert", "data"), None, "tensor"), "all_to_all", SEATS),  # in another order
    ]
    for spec, executor, config in tries if axis_types == "auto" else tries[:1]:
        x_BSD = jax.device_put(X_BSD, NamedSharding(mesh, spec))
        params = jax.device_put(params_of(config), whole)
        run = jax.jit(functools.partial(with_gradient, config, layout=Layout(mesh, executor=executor)))
        there = jax.block_until_ready(run(params, x_BSD))
        assert_trees_close(jax.device_get(there), HERE[config])
        print("placed", axis_types, spec, executor)


def check_one_device_arguments():
    """Arguments on one device of the mesh give the right result or an error, jitted or not."""
    mesh = make_mesh(2, 1, 4, 1)
    params, x_BSD = jax.device_put((params_of(SEATS), X_BSD), jax.devices()[0])
    for wrap in (jax.jit, lambda function: function):
        run = wrap(lambda params, x_BSD: moe(params, x_BSD, SEATS, mesh=mesh, train=True, key=KEY))
        try:
            there = jax.device_get(jax.block_until_ready(run(params, x_BSD)))
        except ValueError as error:
            assert "incompatible devices" in str(error), error
            print("refused")
        else:
            assert_trees_close(there, HERE[SEATS][1])
            print("moved")


def check_transformations():
    """Three layers in a scan, rematerialised, differentiated, their rows donated, on 4 of the 8 devices."""

    def layers(params, x_BSD, mesh):
        run = sm.moe if mesh is None else functools.partial(moe, mesh=mesh)

        @jax.checkpoint
        def layer(x_BSD, index):
            key = jax.random.fold_in(KEY, index)
            y_BSD, aux = run(params, x_BSD, SEATS, train=True, key=key)
            return x_BSD + 0.1 * y_BSD, aux

        x_BSD, aux = jax.lax.scan(layer, x_BSD, jnp.arange(3))
        return jnp.sum(jnp.sin(x_BSD)) + sm.aux_loss(aux, SEATS), aux

    step = jax.jit(
        jax.value_and_grad(layers, argnums=(0, 1), has_aux=True), static_argnums=2, donate_argnums=1
    )
    here = jax.device_get(step(params_of(SEATS), jnp.array(X_BSD), None))
    mesh = make_mesh(1, 1, 4, 1)
    rows = jax.device_put(X_BSD, Layout(mesh).sharding(Layout(mesh).batch_spec()))
    weights = jax.device_put(params_of(SEATS), Layout(mesh).sharding())
    there = jax.block_until_ready(step(weights, rows, mesh))
    assert rows.is_deleted() and there[0][1].load_E.shape == (3, EXPERTS)
    assert_trees_close(jax.device_get(there), here)
    print("transformed")


def check_a_mesh_of_one():
    """One device's mesh computes what no mesh does, bit for bit."""
    mesh = make_mesh(1, 1, 1, 1)
    for config in (SEATS, SORTED):
        there = jax.jit(functools.partial(with_gradient, config, mesh=mesh))(params_of(config), X_BSD)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), HERE[config])
        print("alone", config.dispatch)


if __name__ == "__main__":
    check_placements("auto")
    check_placements("explicit")
    check_one_device_arguments()
    check_transformations()
    check_a_mesh_of_one()
