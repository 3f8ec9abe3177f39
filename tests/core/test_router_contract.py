"""What every router promises, over all of ROUTERS; a new router is covered by its line in that dict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing import ROUTERS, Routing, make_router

from . import oracle
from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_x

GROUPS, TOKENS, D_MODEL, EXPERTS = 2, 6, 4, 3


ANY_K = [dict(top_k=1), dict(top_k=2), dict(top_k=2, renormalize=True)]
# The settings a router is tried with, where they are not those of any k.
VARIANTS = {
    "switch": [dict()],
    "top_k_then_softmax": [dict(top_k=2)],
    "gshard": [dict(top_k=2)],
    "sigmoid": [*ANY_K, dict(top_k=2, expert_groups=3, groups_per_token=2)],
    "random": [dict(top_k=2)],
    "balanced": [dict(top_k=2)],
}
BLIND = ("random", "balanced")  # they look at no score, so no bias moves them and no gradient reaches them
ALWAYS_NOISY = ("gshard", "random")  # they draw in training whatever the settings


ALL = [(name, options) for name in ROUTERS for options in VARIANTS.get(name, ANY_K)]
SEEING = [case for case in ALL if case[0] not in BLIND]


def build(case):
    name, options = case
    return make_config(router=name, init_scale=40.0, **options)


@pytest.fixture(params=ALL, ids=str)
def config(request):
    return build(request.param)


@pytest.fixture(params=SEEING, ids=str)
def seeing(request):
    """A config whose router looks at the scores."""
    return build(request.param)


def adds_to_one(config):
    return config.renormalize or config.router in ("top_k_then_softmax", "gshard", *BLIND)


@pytest.fixture
def router(config):
    return make_router(config)


@pytest.fixture
def params(router):
    return router.init(jax.random.key(3))


@functools.partial(jax.jit, static_argnames=("config", "train"))
def apply(params, x_GTD, config, *, key=None, mask=None, bias=None, train=False):
    return make_router(config).apply(params, x_GTD, key=key, mask=mask, bias=bias, train=train)


def test_fields_have_their_shapes_and_types(params, config):
    # A NamedTuple's annotations are not checked by the import hook, so here they are.
    k, mask = config.top_k, jnp.arange(TOKENS) < 4
    mask = jnp.broadcast_to(mask, (GROUPS, TOKENS))
    expected = {
        "expert_GTK": ((GROUPS, TOKENS, k), jnp.int32),
        "weight_GTK": ((GROUPS, TOKENS, k), jnp.float32),
        "logits_GTE": ((GROUPS, TOKENS, EXPERTS), jnp.float32),
        "probs_GTE": ((GROUPS, TOKENS, EXPERTS), jnp.float32),
        "mask_GT": ((GROUPS, TOKENS), jnp.bool_),
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        x = make_x(1, GROUPS, TOKENS, D_MODEL).astype(dtype)
        for given in (mask, None):
            routing = apply(params, x, config, mask=given)
            assert isinstance(routing, Routing)
            assert {name: (f.shape, f.dtype) for name, f in routing._asdict().items()} == expected
            np.testing.assert_array_equal(routing.mask_GT, jnp.ones_like(mask) if given is None else mask)


def test_decisions_are_legal(params, config):
    routing = apply(params, make_x(2, GROUPS, TOKENS, D_MODEL), config)
    expert, weight, probs = (
        np.asarray(f) for f in (routing.expert_GTK, routing.weight_GTK, routing.probs_GTE)
    )
    assert ((0 <= expert) & (expert < EXPERTS)).all()
    assert all(len(set(row)) == config.top_k for row in expert.reshape(-1, config.top_k))  # k different ones
    assert ((0 <= weight) & (weight <= 1 + 1e-6)).all() and (
        np.diff(weight, axis=-1) <= 0
    ).all()  # best first
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    if adds_to_one(config):
        np.testing.assert_allclose(weight.sum(-1), 1, rtol=1e-5)
    assert len(np.unique(expert)) > 1  # the case is not degenerate
    assert (weight.std() > 1e-3) == (config.router not in BLIND)


def test_routers_choose_and_weigh_as_the_oracle(seeing):
    config, params = seeing, make_router(seeing).init(jax.random.key(3))
    routing = apply(params, make_x(3, GROUPS, TOKENS, D_MODEL), config)
    for at in np.ndindex(GROUPS, TOKENS):
        logits = np.asarray(routing.logits_GTE[at], np.float64)
        scores = oracle.sigmoid(logits) if config.router == "sigmoid" else oracle.softmax(logits)
        probs = scores / scores.sum()
        chosen = oracle.best_within_groups(
            scores, config.top_k, config.expert_groups, config.groups_per_token
        )
        weights = scores[chosen] / (scores[chosen].sum() if adds_to_one(config) else 1.0)
        assert list(routing.expert_GTK[at]) == chosen
        np.testing.assert_allclose(routing.probs_GTE[at], probs, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(routing.weight_GTK[at], weights, rtol=1e-5)


def test_later_choices_follow_logits_too_small_for_a_probability():
    # exp(-150) and exp(-200) are both 0 in float32; expert 2 is the better second choice all the same.
    config = make_config(router="top_k", top_k=2)
    assert sm.route(jnp.array([[0.0, -200.0, -150.0]]), config).expert_GTK.tolist() == [[0, 2]]


def test_ties_go_to_the_lowest_index(seeing):
    # Logits (5, 5, 5), (1, 5, 5), (5, 1, 5): the first k of 0 1 2, of 1 2 0 and of 0 2 1.
    logits = jnp.array([[5.0, 5.0, 5.0], [1.0, 5.0, 5.0], [5.0, 1.0, 5.0]])
    routing = sm.route(logits, seeing)
    order = np.array([[0, 1, 2], [1, 2, 0], [0, 2, 1]])
    np.testing.assert_array_equal(routing.expert_GTK, order[:, : seeing.top_k])


def test_bf16_input_is_routed_in_float32(params, config):
    x = make_x(4, GROUPS, TOKENS, D_MODEL).astype(jnp.bfloat16)
    assert_trees_close(apply(params, x, config), apply(params, x.astype(jnp.float32), config), 1e-6)


def test_padding_decides_nothing_for_others(params, config):
    x = make_x(5, GROUPS, TOKENS, D_MODEL)
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]], bool)
    one = apply(params, x, config, mask=mask)
    other = apply(params, jnp.where(mask[..., None], x, 100.0), config, mask=mask)
    for name, a, b in zip(one._fields, one, other, strict=True):
        np.testing.assert_array_equal(a[mask], b[mask], err_msg=name)


def test_groups_are_independent_and_vmap(params, config):
    x = make_x(6, GROUPS, TOKENS, D_MODEL)
    # A key for each group: without, a router that draws in evaluation takes a group for the first.
    keys = jax.random.split(jax.random.key(5), GROUPS)
    whole = apply(params, x, config, key=keys)
    alone = [apply(params, x[g : g + 1], config, key=keys[g : g + 1]) for g in range(GROUPS)]
    assert_trees_close(whole, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone), 1e-6)
    mapped = jax.vmap(lambda group, key: apply(params, group[None], config, key=key[None]))(x, keys)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[:, 0], mapped), whole, 1e-6)


def test_choosing_from_scores_is_the_part_after_the_scores(params, config, router):
    routing = apply(params, make_x(7, GROUPS, TOKENS, D_MODEL), config)
    assert_trees_close(sm.route(routing.logits_GTE, config), routing, 1e-6)
    assert_trees_close(router.choose(routing.logits_GTE), routing, 1e-6)
    single = sm.route(routing.logits_GTE[0], config)  # without a group dimension
    assert_trees_close(single, jax.tree.map(lambda leaf: leaf[0], routing), 1e-6)


def test_a_bias_moves_the_choice_and_not_the_weight(seeing):
    config, x = seeing, make_x(8, GROUPS, TOKENS, D_MODEL)
    params = make_router(config).init(jax.random.key(3))
    plain = apply(params, x, config)
    pushed = apply(params, x, config, bias=jnp.array([0.0, 0.0, 2.0]))  # more than any probability
    assert (np.asarray(pushed.expert_GTK[..., 0]) == 2).all()
    np.testing.assert_array_equal(pushed.probs_GTE, plain.probs_GTE)
    scores = jax.nn.sigmoid(plain.logits_GTE) if config.router == "sigmoid" else plain.probs_GTE
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(pushed.expert_GTK), -1)
    expected = chosen / chosen.sum(-1, keepdims=True) if adds_to_one(config) else chosen
    np.testing.assert_allclose(pushed.weight_GTK, expected, rtol=1e-5)
    assert_trees_close(apply(params, x, config, bias=jnp.zeros(EXPERTS)), plain, 1e-6)


def test_training_without_noise_is_evaluation(params, config):
    x, key = make_x(9, GROUPS, TOKENS, D_MODEL), jax.random.key(1)
    trained, evaluated = apply(params, x, config, train=True, key=key), apply(params, x, config)
    if config.router in ALWAYS_NOISY:
        assert bool((trained.expert_GTK != evaluated.expert_GTK).any())
    else:
        assert_trees_close(trained, evaluated, 0)


def test_gradient_reaches_the_router_where_it_should(params, config):
    x, pull = make_x(10, GROUPS, TOKENS, D_MODEL), make_x(11, GROUPS, TOKENS, config.top_k)
    mask = np.array([[1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]], bool)
    bias = jnp.array([0.1, 0.0, -0.1])

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(read, params, x, bias):
        return jax.grad(lambda *a: read(apply(a[0], a[1], config, mask=mask, bias=a[2])), argnums=(0, 1, 2))(
            params, x, bias
        )

    def weights(routing):
        return jnp.sum(pull * routing.weight_GTK * routing.mask_GT[..., None])

    def losses(routing):
        return jnp.sum(routing.probs_GTE[..., 0] * routing.mask_GT)

    for read in (weights, losses):
        grad, x_grad, bias_grad = gradient(read, params, x, bias)
        if config.router in BLIND:
            assert not any(leaf.any() for leaf in jax.tree.leaves((grad, x_grad, bias_grad)))
            continue
        assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(grad))
        assert not bias_grad.any()  # the bias is state, not a parameter
        assert not x_grad[~mask].any() and bool((jnp.abs(x_grad[mask]).max(-1) > 0).all())


def test_gradient_of_an_unrenormalised_weight_by_hand(config):
    # d p_i / d logit_j = p_i (delta_ij - p_j): for logits (ln 3, 0, 0), p = (3/5, 1/5, 1/5), of the first
    # weight (.24, -.12, -.12). Renormalised over the first two: w = 3/4, of which the third logit knows
    # nothing: (3/16, -3/16, 0).
    # By sigmoid, s = (3/4, 1/2, 1/2) and d s_i / d logit_i = s_i (1 - s_i): (3/16, 0, 0). Renormalised, w =
    # 3/4 / (5/4) = 3/5 and d w / d log s = w (1 - w) (1, -1) = (.24, -.24), times d log s_i / d logit_i =
    # 1 - s_i = (1/4, 1/2): (.06, -.12, 0).
    logits = jnp.array([[np.log(3.0), 0.0, 0.0]])
    grad = jax.grad(lambda logits: sm.route(logits, config).weight_GTK[0, 0])(logits)
    if config.router in BLIND:
        expected = [0, 0, 0]
    elif config.router == "sigmoid":
        expected = [0.06, -0.12, 0] if config.renormalize else [3 / 16, 0, 0]
    else:
        expected = [3 / 16, -3 / 16, 0] if adds_to_one(config) else [0.24, -0.12, -0.12]
    assert_close_to_peak(grad[0], expected)


def test_init_is_float32_and_follows_the_key(router, params):
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    other = router.init(jax.random.key(4))
    assert any(
        float(jnp.abs(a - b).max()) > 0 for a, b in zip(*map(jax.tree.leaves, (params, other)), strict=True)
    )
