"""The layer inside other libraries' modules: they hold its parameters, the function does the rest."""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm

CONFIG = sm.MoEConfig(d_model=8, d_ff=16, num_experts=4, eval_capacity_factor=1.0)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 12, 8))


def loss_of(y, aux):
    return jnp.sum(jnp.sin(y)) + sm.aux_loss(aux, CONFIG)


class EquinoxMoE(eqx.Module):
    params: sm.MoEParams
    config: sm.MoEConfig = eqx.field(static=True)

    def __call__(self, x):
        return sm.moe(self.params, x, self.config)


class LinenMoE(linen.Module):
    config: sm.MoEConfig

    @linen.compact
    def __call__(self, x):
        return sm.moe(self.param("moe", lambda key: sm.init_moe(KEY, self.config)), x, self.config)


def haiku_moe(x):
    drawn = sm.init_moe(KEY, CONFIG)
    names = ("router_DE", "w_in_EDF", "w_out_EFD")
    router_DE, w_in_EDF, w_out_EFD = (
        hk.get_parameter(name, value.shape, init=lambda shape, dtype, value=value: value)
        for name, value in zip(names, (drawn.router_DE, *drawn.experts[:2]), strict=True)
    )
    return sm.moe(sm.MoEParams(router_DE, sm.ExpertParams(w_in_EDF, w_out_EFD)), x, CONFIG)


def in_equinox():
    module = EquinoxMoE(sm.init_moe(KEY, CONFIG), CONFIG)
    y, aux = eqx.filter_jit(module)(X)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda module: loss_of(*module(X))))(module)
    return y, aux, jax.tree.leaves(gradient.params)


def in_linen():
    module = LinenMoE(CONFIG)
    variables = module.init(jax.random.key(5), X)
    y, aux = jax.jit(module.apply)(variables, X)
    gradient = jax.jit(jax.grad(lambda variables: loss_of(*module.apply(variables, X))))(variables)
    return y, aux, jax.tree.leaves(gradient["params"]["moe"])


def in_haiku():
    module = hk.without_apply_rng(hk.transform(haiku_moe))
    params = module.init(jax.random.key(5), X)
    y, aux = jax.jit(module.apply)(params, X)
    gradient = jax.jit(jax.grad(lambda params: loss_of(*module.apply(params, X))))(params)["~"]
    return y, aux, [gradient[name] for name in ("router_DE", "w_in_EDF", "w_out_EFD")]


@pytest.mark.parametrize("run", [in_equinox, in_linen, in_haiku])
def test_the_layer_is_the_same_inside_another_library(run):
    params = sm.init_moe(KEY, CONFIG)
    plain_y, plain_aux = sm.moe(params, X, CONFIG)
    plain_gradient = jax.grad(lambda params: loss_of(*sm.moe(params, X, CONFIG)))(params)
    assert float(plain_aux.dropped) > 0  # the case drops tokens
    y, aux, gradient = run()
    np.testing.assert_allclose(y, plain_y, atol=1e-6)
    for found, expected in zip(aux, plain_aux, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for found, expected in zip(gradient, jax.tree.leaves(plain_gradient), strict=True):
        assert float(jnp.abs(expected).max()) > 0
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
