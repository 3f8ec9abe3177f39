"""Mistakes that other code bases shipped, each as a test that would have caught it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.seats import capacity

from . import oracle
from .worlds import assert_close_to_peak, make_config, make_params, make_x, moe, moe_with_trace, summarize

SEATED = ("gather", "einsum")  # those with seats that run out
DISPATCHES = (*SEATED, "dropless")


def identity_world(router_DE, *, scale_E, dispatch="gather", **options):
    """Experts that return scale_e * x for x >= 0 (W_in = 1, W_out = scale_e * 1): outputs read off by eye."""
    d_model, experts = np.shape(router_DE)
    eye_EDD = jnp.broadcast_to(jnp.eye(d_model), (experts, d_model, d_model))
    scaled_EDD = eye_EDD * jnp.asarray(scale_E, jnp.float32)[:, None, None]
    config = sm.MoEConfig(
        d_model=d_model,
        d_ff=d_model,
        num_experts=experts,
        dispatch=dispatch,
        router="top_k" if options.get("top_k", 1) > 1 else "switch",
        **options,
    )
    return sm.MoEParams(jnp.asarray(router_DE, jnp.float32), sm.ExpertParams(eye_EDD, scaled_EDD)), config


# 1. transformers#48293: z-loss of probabilities instead of logits, and a cumsum over the wrong axis.


def test_z_loss_is_of_logits():
    # x = 1, router (ln 3, ln 5), so both tokens have logsumexp = ln 8 = 2.0794 and z = 4.3241. On the
    # probabilities (3/8, 5/8) it would be logsumexp**2 = ln(e**.375 + e**.625)**2 = 1.44.
    params, config = identity_world([[np.log(3.0), np.log(5.0)]], scale_E=[1, 1])
    _, aux = moe(params, jnp.ones((1, 2, 1)), config)
    assert float(summarize(aux)["z_loss"]) == pytest.approx(np.log(8.0) ** 2, rel=1e-6)
    assert float(aux.z_sum) == pytest.approx(2 * np.log(8.0) ** 2, rel=1e-6)


@pytest.mark.parametrize("dispatch", SEATED)
def test_tokens_are_really_dropped_and_return_exactly_zero(dispatch):
    # 1 and 2. Four tokens, all for expert 0 (logits (2 x, 0)), factor 1.0, 2 experts: 4 / 2 = 2 seats. The
    # first two tokens stay, the last two return 0 and not p * x (transformers#37017).
    params, config = identity_world([[2.0, 0.0]], scale_E=[3, 5], dispatch=dispatch, eval_capacity_factor=1.0)
    x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    y, aux, trace = moe_with_trace(params, x, config)
    p = [1 / (1 + np.exp(-2.0 * v)) for v in (1.0, 2.0)]
    np.testing.assert_allclose(y[0, :2, 0], [3 * p[0] * 1.0, 3 * p[1] * 2.0], rtol=1e-6)
    np.testing.assert_array_equal(y[0, 2:], 0.0)
    np.testing.assert_array_equal(trace.kept_SK[0, :, 0], [True, True, False, False])
    assert (float(aux.dropped), float(aux.choices)) == (2.0, 4.0)
    np.testing.assert_array_equal(aux.load_E, [4, 0])
    np.testing.assert_array_equal(aux.kept_E, [2, 0])
    assert float(summarize(aux)["dropped_fraction"]) == 0.5


def test_dropless_drops_nobody():
    # The same four tokens, whatever the factor says: all at expert 0, which multiplies by 3.
    params, config = identity_world(
        [[2.0, 0.0]], scale_E=[3, 5], dispatch="dropless", eval_capacity_factor=0.1
    )
    y, aux, trace = moe_with_trace(params, jnp.array([[[1.0], [2.0], [3.0], [4.0]]]), config)
    expected = [3 * v / (1 + np.exp(-2.0 * v)) for v in (1.0, 2.0, 3.0, 4.0)]
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-6)
    assert bool(trace.kept_SK.all()) and (float(aux.dropped), float(aux.expected_dropped)) == (0.0, 0.0)
    np.testing.assert_array_equal(aux.kept_E, [4, 0])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_each_token_meets_its_own_expert(dispatch):
    # 2. transformers#33463: a transpose sent tokens to wrong experts. Tokens are unit vectors, the router
    # names for each its expert (a permutation without symmetry), expert e multiplies by e + 1.
    wanted = [2, 0, 3, 1, 2]
    router = 9.0 * np.eye(4)[wanted]
    params, config = identity_world(router, scale_E=[1, 2, 3, 4], dispatch=dispatch, eval_capacity_factor=8.0)
    y, _, trace = moe_with_trace(params, jnp.eye(5)[None], config)
    np.testing.assert_array_equal(trace.expert_SK[0, :, 0], wanted)
    p = np.exp(9) / (np.exp(9) + 3)
    np.testing.assert_allclose(y[0], np.diag([p * (e + 1) for e in wanted]), rtol=1e-6)


# 3. transformers#29503, #31464, #44242: layers merged before the product, so that they cancel; losses off.


def test_layers_do_not_cancel_in_the_balance_loss():
    # Two layers, two experts, all tokens surely at expert 0 in one and at expert 1 in the other. Each layer
    # has E * sum f P = 2 * 1 * 1 = 2, together 4; merged first, f = P = (1/2, 1/2) and the loss says 1 (or
    # 2).
    layers = []
    for sign in (30.0, -30.0):
        params, config = identity_world([[sign, 0.0]], scale_E=[1, 1])
        layers.append(moe(params, jnp.ones((1, 4, 1)), config)[1])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert [float(summarize(aux)["balance_loss"]) for aux in layers] == pytest.approx([2.0, 2.0])
    assert float(summarize(stacked)["balance_loss"]) == pytest.approx(4.0)
    loss = sm.aux_loss(stacked, sm.MoEConfig(balance_coef=0.25, z_coef=0.5))
    z = float(summarize(stacked)["z_loss"])  # 30**2 (logits 30, 0) + 0 (logits -30, 0): 900
    assert z == pytest.approx(900.0, rel=1e-5) and float(loss) == pytest.approx(0.25 * 4 + 0.5 * z, rel=1e-6)


def test_losses_are_on_by_default_and_padding_does_not_pollute_them():
    params, x = make_params(20), make_x(20, 2, 6, 4)
    config = make_config(z_coef=1e-3)
    assert sm.MoEConfig().balance_coef == 1e-2
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    x_padded = jnp.where(mask[..., None], x, 50.0)  # padding with a strong opinion
    _, aux = moe(params, x_padded, config, mask=mask)
    real = [moe(params, x[0, :4], config)[1], moe(params, x[1, :2], config)[1]]
    for name in ("balance_loss", "z_loss", "router_entropy", "top_prob", "max_vio"):
        expected = summarize(sm.add_aux(*real))[name]
        assert float(summarize(aux)[name]) == pytest.approx(float(expected), rel=1e-5), name
    gradient = jax.grad(lambda p: sm.aux_loss(moe(p, x, config)[1], config))(params)
    assert float(jnp.abs(gradient.router).max()) > 1e-4


# 4. flaxformer: bf16 logits, capacity without k and half to even, dropped fraction wrong with padding at k=2.


def test_router_computes_in_float32_under_bf16():
    # 4 and 5. x is exact in bf16; the logits are 1 and 1 + 2**-9, one number in bf16 (8 bits), so a bf16
    # router sees a tie and takes expert 0. In float32 expert 1 wins. Once by weight, once by accumulation.
    eps = 2.0**-9
    cases = (
        ([[1.0, 1.0 + eps]], [[[1.0]]], "gather"),
        ([[1.0, 1.0], [0.0, 1.0]], [[[1.0, eps]]], "dropless"),
    )
    for router, x, dispatch in cases:
        params, config = identity_world(router, scale_E=[1, 1], dispatch=dispatch)
        for dtype in (jnp.bfloat16, jnp.float32):
            y, aux, trace = moe_with_trace(params, jnp.asarray(x, dtype), config)
            assert int(trace.expert_SK[0, 0, 0]) == 1, dtype
            assert trace.weight_SK.dtype == jnp.float32 and y.dtype == dtype
            assert {leaf.dtype for leaf in aux} == {jnp.dtype("float32")}
            # logsumexp(1, 1 + eps)**2, to float32's precision and not bf16's
            assert float(aux.z_sum) == pytest.approx(oracle.log_sum_exp([1.0, 1.0 + eps]) ** 2, rel=1e-6)
    assert int(jnp.argmax(jnp.array([1.0, 1.0 + eps], jnp.bfloat16))) == 0  # the case is what it says


def test_capacity_counts_k_and_rounds_up():
    assert capacity(8, 4, 2, 1.0) == 4  # 16 choices over 4 experts; without k it would be 2
    assert capacity(10, 4, 1, 1.0) == 3  # 2.5: half to even gives 2


def test_dropped_fraction_is_of_real_choices():
    # Six positions, two of them padding; k = 2, 3 experts. Logits (2, 1, 0) x with x > 0 for everybody: the
    # four real tokens ask for experts 0 and 1, 8 choices; expert_capacity 3 keeps 3 + 3. Dropped: 2 of 8.
    # Over all positions it would be 2 / 12, over tokens 2 / 4.
    params, config = identity_world([[2.0, 1.0, 0.0]], scale_E=[1, 1, 1], top_k=2, expert_capacity=3)
    mask = jnp.array([[True, True, False, True, True, False]])
    _, aux = moe(params, jnp.ones((1, 6, 1)), config, mask=mask)
    assert (float(aux.dropped), float(aux.choices), float(aux.tokens)) == (2.0, 8.0, 4.0)
    assert float(summarize(aux)["dropped_fraction"]) == 0.25


def test_groups_are_as_large_as_asked():
    # 4. Who asks for groups of 4096 tokens gets them: one seat short of 4096 drops exactly one token.
    params, config = identity_world([[1.0, 0.0]], scale_E=[1, 1], expert_capacity=4095, sequences_per_group=4)
    _, aux = moe(params, jnp.ones((4, 1024, 1)), config)
    assert (float(aux.tokens), float(aux.dropped)) == (4096.0, 1.0)


# 5. vmoe: experts identical at the start; an unused expert's NaN reaches every token.


def test_experts_differ_at_the_start():
    params = sm.init_moe(jax.random.key(0), sm.MoEConfig(d_model=8, d_ff=16, num_experts=4, gated=True))
    for leaf in jax.tree.leaves(params.experts):
        for a in range(4):
            for b in range(a):
                assert float(jnp.abs(leaf[a] - leaf[b]).mean()) > 0.1 * float(jnp.abs(leaf).mean())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_unused_expert_poisons_nobody(dispatch, bad):
    # Expert 2 gets no token (its logit is far below) and holds NaN. Outputs, sums, and the gradients of
    # everything but that expert are as without it.
    params, x = make_params(21, router_scale=0.5), jnp.abs(make_x(21, 2, 6, 4))
    params = params._replace(router=params.router.at[:, 2].set(-20.0))
    poisoned = params._replace(experts=jax.tree.map(lambda leaf: leaf.at[2].set(bad), params.experts))
    config = make_config(dispatch=dispatch, eval_capacity_factor=1.0)

    def scalar(params, x):
        y, aux = moe(params, x, config)
        return jnp.sum(jnp.sin(y)) + sm.aux_loss(aux, config), (y, aux)

    gradient = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))
    (grads, x_grad), (y, aux) = gradient(poisoned, x)
    (clean_grads, clean_x_grad), (clean_y, _) = gradient(params, x)
    assert float(aux.load_E[2]) == 0 and (float(aux.dropped) > 0) == (dispatch in SEATED)
    assert_close_to_peak(y, clean_y)
    assert_close_to_peak(x_grad, clean_x_grad)
    assert_close_to_peak(grads.router, clean_grads.router)
    for leaf, clean in zip(jax.tree.leaves(grads.experts), jax.tree.leaves(clean_grads.experts), strict=True):
        assert_close_to_peak(leaf[:2], clean[:2])
