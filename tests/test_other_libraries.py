"""The router, and the whole layer, inside other libraries: they hold the weights, functions do the rest."""

import functools

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import switchmoe as sm
from switchmoe.routing import make_router

CONFIG = sm.MoEConfig(d_model=8, d_ff=16, num_experts=4, eval_capacity_factor=1.0)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 12, 8))
ROUTER_DE = make_router(CONFIG).init(KEY) * 10


# The router alone. In each example the library's own linear layer scores the tokens and `sm.route` decides;
# what happens to the tokens then is one's own affair, here an expert that multiplies by its number.


def send(logits, x):
    """Route by these scores, and send each token to its expert and back, four seats an expert."""
    routing = sm.route(logits, CONFIG)
    plan = sm.assign_slots(routing, capacity=4)
    y_GECD = sm.dispatch(x, plan) * jnp.arange(1.0, 5.0)[:, None, None]
    return sm.combine(y_GECD, plan)


def route_in_plain_jax():
    router = make_router(CONFIG)  # init(key) -> params, apply(params, x, ...) -> Routing

    def layer(params, x):
        return send(router.apply(params, x).logits_GTE, x)

    return layer, ROUTER_DE, lambda weights: weights


def route_in_linen():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            score = linen.Dense(4, use_bias=False, kernel_init=lambda *_: ROUTER_DE)
            return send(score(x), x)

    layer = Layer()
    return layer.apply, layer.init(KEY, X), lambda variables: variables["params"]["Dense_0"]["kernel"]


def route_in_nnx():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.score = nnx.Linear(8, 4, use_bias=False, kernel_init=lambda *_: ROUTER_DE, rngs=rngs)

        def __call__(self, x):
            return send(self.score(x), x)

    graph, state = nnx.split(Layer(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, lambda state: state["score"]["kernel"][...]


def route_in_equinox():
    class Layer(eqx.Module):
        score: eqx.nn.Linear

        def __call__(self, x):
            return send(jax.vmap(jax.vmap(self.score))(x), x)

    score = eqx.nn.Linear(8, 4, use_bias=False, key=KEY)
    layer = Layer(eqx.tree_at(lambda linear: linear.weight, score, ROUTER_DE.T))
    return Layer.__call__, layer, lambda layer: layer.score.weight.T


def route_in_haiku():
    def layer(x):
        return send(hk.Linear(4, with_bias=False, w_init=hk.initializers.Constant(ROUTER_DE))(x), x)

    module = hk.without_apply_rng(hk.transform(layer))
    return module.apply, module.init(KEY, X), lambda params: params["linear"]["w"]


@pytest.mark.parametrize(
    "example", [route_in_plain_jax, route_in_linen, route_in_nnx, route_in_equinox, route_in_haiku]
)
def test_the_router_is_the_same_inside_another_library(example):
    # y = p * (e + 1) * x for the best expert e, or 0 if its four seats are taken.
    layer, params, weight_of = example()
    probs = np.asarray(jax.nn.softmax(X @ ROUTER_DE, axis=-1))
    expected, dropped = np.zeros(X.shape), 0
    for g in range(2):
        taken = np.zeros(4, int)
        for t, expert in enumerate(probs[g].argmax(-1)):
            if taken[expert] < 4:
                expected[g, t] = probs[g, t, expert] * (expert + 1) * X[g, t]
            dropped += taken[expert] >= 4
            taken[expert] += 1
    assert dropped > 0

    def loss(params):
        y = layer(params, X)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    plain = plain_gradient()
    np.testing.assert_allclose(weight_of(gradient), plain, atol=1e-5 * float(jnp.abs(plain).max()))


@functools.cache
def plain_gradient():
    return jax.jit(jax.grad(lambda router: jnp.sum(jnp.sin(send(X @ router, X)))))(ROUTER_DE)


# The whole layer.


def loss_of(call):
    """A scalar of the layer's output and its losses, and both beside it."""
    y, aux = call(X)
    return jnp.sum(jnp.sin(y)) + sm.aux_loss(aux, CONFIG), (y, aux)


class LinenMoE(linen.Module):
    config: sm.MoEConfig

    @linen.compact
    def __call__(self, x):
        return sm.moe(self.param("moe", lambda key: sm.init_moe(KEY, self.config)), x, self.config)


def in_linen():
    module = LinenMoE(CONFIG)
    variables = jax.jit(module.init)(jax.random.key(5), X)
    gradient = jax.grad(lambda variables: loss_of(lambda x: module.apply(variables, x)), has_aux=True)
    gradient, answer = jax.jit(gradient)(variables)
    return *answer, jax.tree.leaves(gradient["params"]["moe"])


def in_nnx():
    module, params = sm.nn.MoE(CONFIG, rngs=nnx.Rngs(0)), sm.init_moe(KEY, CONFIG)
    module.router_DE[...], module.w_in_EDF[...], module.w_out_EFD[...] = params.router, *params.experts[:2]
    gradient, answer = nnx.jit(nnx.grad(loss_of, has_aux=True))(module)
    return *answer, [gradient[name][...] for name in ("router_DE", "w_in_EDF", "w_out_EFD")]


class EquinoxMoE(eqx.Module):
    params: sm.MoEParams
    config: sm.MoEConfig = eqx.field(static=True)

    def __call__(self, x):
        return sm.moe(self.params, x, self.config)


def in_equinox():
    module = EquinoxMoE(sm.init_moe(KEY, CONFIG), CONFIG)
    gradient, answer = eqx.filter_jit(eqx.filter_grad(loss_of, has_aux=True))(module)
    return *answer, jax.tree.leaves(gradient.params)


def haiku_moe(x):
    drawn = sm.init_moe(KEY, CONFIG)
    names = ("router_DE", "w_in_EDF", "w_out_EFD")
    router_DE, w_in_EDF, w_out_EFD = (
        hk.get_parameter(name, value.shape, init=lambda shape, dtype, value=value: value)
        for name, value in zip(names, (drawn.router, *drawn.experts[:2]), strict=True)
    )
    return sm.moe(sm.MoEParams(router_DE, sm.ExpertParams(w_in_EDF, w_out_EFD)), x, CONFIG)


def in_haiku():
    module = hk.without_apply_rng(hk.transform(haiku_moe))
    params = jax.jit(module.init)(jax.random.key(5), X)
    gradient = jax.grad(lambda params: loss_of(lambda x: module.apply(params, x)), has_aux=True)
    gradient, answer = jax.jit(gradient)(params)
    return *answer, [gradient["~"][name] for name in ("router_DE", "w_in_EDF", "w_out_EFD")]


@functools.cache
def plain_layer():
    gradient = jax.grad(lambda params: loss_of(lambda x: sm.moe(params, x, CONFIG)), has_aux=True)
    gradient, answer = jax.jit(gradient)(sm.init_moe(KEY, CONFIG))
    return *answer, jax.tree.leaves(gradient)


@pytest.mark.parametrize("run", [in_linen, in_nnx, in_equinox, in_haiku])
def test_the_layer_is_the_same_inside_another_library(run):
    plain_y, plain_aux, plain = plain_layer()
    y, aux, gradient = run()
    assert float(plain_aux.dropped) > 0  # the case drops tokens
    np.testing.assert_allclose(y, plain_y, atol=1e-6)
    for found, expected in zip(aux, plain_aux, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for found, expected in zip(gradient, plain, strict=True):
        peak = float(jnp.abs(expected).max())
        assert peak > 0
        np.testing.assert_allclose(found, expected, atol=1e-5 * peak)
