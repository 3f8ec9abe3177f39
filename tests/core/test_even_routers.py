"""Sinkhorn and BASE, even in training: goldens by hand, plain scaling of a table and an exact solver."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from switchmoe.routing import assign_evenly
from switchmoe.routing import choose_base as choose_base_eagerly
from switchmoe.routing import choose_sinkhorn as choose_sinkhorn_eagerly
from switchmoe.routing.base_layers import TOLERANCE
from switchmoe.routing.sinkhorn import sinkhorn_plan as sinkhorn_plan_eagerly

from .test_more_routers import config_of, route
from .worlds import assert_close_to_peak, make_x

choose_base = jax.jit(choose_base_eagerly)
choose_sinkhorn = jax.jit(choose_sinkhorn_eagerly, static_argnames="k")
sinkhorn_plan = jax.jit(sinkhorn_plan_eagerly)


def test_golden_sinkhorn():
    # Both tokens like expert 0, by 2 and by 1. A plan of two even rows and columns is ((p, 1 - p), (1 - p,
    # p)); scaling rows and columns keeps its cross ratio, (p / (1 - p))**2 = exp(2 + 0 - 1 - 0): the second
    # token has to go. Its weight is its own softmax, 1 / (1 + e).
    logits = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    p = 1 / (1 + np.exp(-0.5))
    plan = jnp.exp(sinkhorn_plan(logits, jnp.ones(2, bool)))
    np.testing.assert_allclose(plan, [[p, 1 - p], [1 - p, p]], rtol=1e-5)
    routing = choose_sinkhorn(logits)
    assert routing.expert_GTK.tolist() == [[0], [1]]
    np.testing.assert_allclose(routing.weight_GTK[:, 0], [1 / (1 + np.exp(-2)), 1 / (1 + np.e)], rtol=1e-6)
    assert route(logits, config_of("sinkhorn", 2)).expert_GTK.tolist() == [[0], [0]]


def test_sinkhorn_plan_as_plain_scaling_of_rows_and_columns():
    logits = make_x(5, 20, 4) + jnp.array([2.0, 0, 0, -1])
    mask = jnp.arange(20) % 5 != 1
    plan = np.exp(np.asarray(logits, np.float64)[mask])
    for _ in range(1000):
        plan *= 4.0 / plan.sum(axis=0)  # 16 real tokens for 4 experts
        plan /= plan.sum(axis=1, keepdims=True)
    found = sinkhorn_plan(logits, mask)
    np.testing.assert_allclose(np.exp(found)[mask], plan, atol=1e-4)
    hidden = sinkhorn_plan(jnp.where(mask[:, None], logits, 50.0), mask)
    np.testing.assert_array_equal(hidden[mask], found[mask])
    assert bool(jnp.isfinite(choose_sinkhorn(logits, k=2, mask=mask & False).weight_GTK).all())


def test_the_assignment_has_no_gradient_and_the_weight_has_its_own():
    # A softmax p gives p_i (1_i=j - p_j), a sigmoid s gives s (1 - s) at the chosen expert.
    logits = make_x(4, 6, 3)
    plan = jax.grad(lambda scores: sinkhorn_plan(scores, jnp.ones(6, bool))[:, 0].sum())(logits)
    assert not plan.any()

    def gradient(choose):
        def pulled(scores):
            routing = choose(scores)
            return routing.weight_GTK.sum(), routing.expert_GTK[:, 0]

        slope, expert = jax.jit(jax.grad(pulled, has_aux=True))(logits)
        return slope, np.eye(3)[expert]

    slope, chosen = gradient(choose_sinkhorn)
    p = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    assert_close_to_peak(slope, (p * chosen).sum(-1, keepdims=True) * (chosen - p))
    slope, chosen = gradient(choose_base)
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    assert_close_to_peak(slope, chosen * sigmoid * (1 - sigmoid))


def test_sinkhorn_evens_out_a_lopsided_router():
    logits = 0.5 * make_x(6, 256, 4) + jnp.array([1.0, 0.0, 0.0, -0.5])
    for k in (1, 2):
        even = jax.nn.one_hot(choose_sinkhorn(logits, k=k).expert_GTK, 4).sum(axis=(0, 1))
        greedy = jax.nn.one_hot(jax.lax.top_k(logits, k)[1], 4).sum(axis=(0, 1))
        mean = 64 * k
        assert float(greedy.max()) > 1.5 * mean and float(even.max()) < 1.25 * mean


def test_golden_base():
    # Everybody likes expert 0, by 2, 4, 1 and 0. Two of them fit: it is cheapest to send tokens 2 and 3 away.
    logits = jnp.array([[5.0, 3.0], [5.0, 1.0], [3.0, 2.0], [2.0, 2.0]])
    routing = choose_base(logits)
    assert routing.expert_GTK.tolist() == [[0], [0], [1], [1]]
    expected = 1 / (1 + np.exp(-np.array([5.0, 5, 2, 2])))
    np.testing.assert_allclose(routing.weight_GTK[:, 0], expected, rtol=1e-6)
    # Without token 3 there are three for twice two seats; padding gets expert 2, which is none.
    masked = choose_base(logits, mask=jnp.array([True, True, True, False]))
    assert masked.expert_GTK.tolist() == [[0], [0], [1], [2]] and float(masked.weight_GTK[3, 0]) == 0
    assert route(logits, config_of("base", 2)).expert_GTK.tolist() == [[0], [0], [0], [0]]


def best_total(scores):
    """The highest total score of an even assignment, by an exact solver: an expert is as many seats."""
    seats = -(-len(scores) // scores.shape[1])
    tokens, seat = linear_sum_assignment(np.repeat(scores, seats, axis=1), maximize=True)
    return scores[tokens, seat // seats].sum()


def test_base_assignment_is_even_and_nearly_the_best():
    # Groups with 0 to 24 real tokens: of normal scores, lopsided ones, whole numbers (ties), all equal, and
    # multiples of one row, so that all tokens want the same.
    rng = np.random.default_rng(8)
    scores = rng.standard_normal((10, 24, 5)).astype(np.float32)
    scores[2:4] += np.linspace(4, 0, 5, dtype=np.float32)
    scores[4:6] = rng.integers(0, 3, scores[4:6].shape)
    scores[6] = 1.0
    scores[7:9] = scores[7:9, :, :1] * scores[7:9, :1, :]
    counts = [24, 23, 24, 21, 24, 22, 24, 24, 3, 0]
    mask = rng.permuted(np.arange(24) < np.array(counts)[:, None], axis=1)
    expert = np.asarray(assign_evenly(jnp.asarray(scores), jnp.asarray(mask)))
    gained = 0.0
    for group, real in zip(range(10), mask, strict=True):
        mine, rows = expert[group][real], scores[group][real].astype(np.float64)
        assert (expert[group][~real] == 5).all() and (mine < 5).all()
        assert np.bincount(mine, minlength=5).max() <= -(-len(mine) // 5)
        if len(mine):
            total, best = rows[np.arange(len(mine)), mine].sum(), best_total(rows)
            step = TOLERANCE * np.ptp(rows, axis=1).max()
            assert best - (len(mine) + 4) * step - 1e-4 <= total <= best + 1e-4
            gained += best - rows[np.arange(len(mine)), np.arange(len(mine)) % 5].sum()
    assert gained > 50  # dealing tokens out like cards would not pass


def test_base_assignment_is_even_when_bidding_is_cut_short():
    scores = make_x(9, 11, 3) + jnp.array([3.0, 0.0, 0.0])
    for rounds in (0, 1, 2):
        loads = np.bincount(assign_evenly(scores, jnp.ones(11, bool), max_rounds=rounds), minlength=4)
        assert loads[:3].max() <= 4 and loads[3] == 0
    alone = assign_evenly(scores[:, :1], jnp.arange(11) > 4)
    assert alone.tolist() == [1] * 5 + [0] * 6
