"""Every router on a batch split over 8 devices gives what it gives on one: noise, drops, gradients."""

from switchmoe.routing import ROUTERS
from tests.devices import run_on_devices

BODY = """
import functools
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import switchmoe as sm
from switchmoe.routing import ROUTERS
from tests.core.routers import TRAITS, Traits, ids_of
from tests.core.worlds import assert_trees_close, make_config, make_x

jax.config.update("jax_disable_most_optimizations", True)
SORTED = ("top_k", "gshard", "sinkhorn")  # by what a dropless plan is made of: also choices that are not used
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
everywhere, by_row = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))


@functools.partial(jax.jit, static_argnames="configs")
def run(params, x, key, configs):
    # Output, sums and gradients; the ways of dispatch in one program, so that routing compiles once.
    def scalar(params, x, config):
        y, aux = sm.moe(params, x, config, train=True, key=key, mask=x[..., 0] < 1.5, token_ids=ids_of(x))
        losses = sm.summarize(aux)
        loss = sum(value for name, value in losses.items() if name.endswith("_loss"))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + loss, (y, aux)

    return [jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x, config) for config in configs]


x, key = make_x(1, 8, 6, 4), jax.random.key(7)
for name in ROUTERS:
    options = TRAITS.get(name, Traits()).variants[0] | dict(init_scale=40.0)
    if name == "soft_moe":
        options |= dict(expert_dropout=0.2)
    else:
        options |= dict(expert_capacity=1)
    configs = [make_config(router=name, **options)]
    if name in SORTED:
        configs.append(make_config(router=name, dispatch="dropless", expert_dropout=0.2, **options))
    params = sm.init_moe(jax.random.key(1), configs[0])
    single = jax.block_until_ready(run(params, x, key, tuple(configs)))
    inputs = jax.block_until_ready(
        (jax.device_put(params, everywhere), jax.device_put(x, by_row), jax.device_put(key, everywhere))
    )
    split = jax.block_until_ready(run(*inputs, tuple(configs)))
    assert len(split[0][1][0].sharding.device_set) == 8, name
    for config, one, other in zip(configs, single, split, strict=True):
        aux = one[1][1]
        assert 0 < float(aux.tokens) < 48
        loses = config.dispatch == "gather" and name not in ("soft_moe", "expert_choice")
        assert (float(aux.dropped) > 0) == loses, (name, aux)
        try:
            assert_trees_close(other, one)
        except AssertionError as error:
            raise AssertionError(f"{name} {config.dispatch}: {error}") from None
    print(name, [config.dispatch for config in configs])
"""


def test_eight_devices_give_what_one_gives():
    printed = run_on_devices(8, BODY, timeout=240)
    assert [line.split()[0] for line in printed.splitlines()] == list(ROUTERS)
    assert printed.count("dropless") == 3
