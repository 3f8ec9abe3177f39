"""Cases worked by hand; the working stands beside each number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing.losses import balance_loss, importance_loss, load_loss, z_loss

from . import oracle
from .worlds import assign_slots, make_routing, moe, seats_of, summarize

# Three tokens, three experts, two choices each, two seats an expert. Best first:
#   token 0: .4 -> expert 0, .2 -> expert 2;  token 1: .5 -> 0, .4 -> 2;  token 2: .6 -> 2, .3 -> 0.
GATES = [[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]]

# (expert, place in its queue) of each token's two choices; a place of 2 or more finds no seat.
GOLDEN = {
    # First choices in order of position: t0 -> expert 0 place 0, t1 -> expert 0 place 1, t2 -> expert 2 place
    # 0. Then the second ones: t0 -> expert 2 place 1, t1 -> expert 2 place 2 (dropped), t2 -> expert 0 place
    # 2 (dropped).
    "choice": [[(0, 0), (2, 1)], [(0, 1), (2, 2)], [(2, 0), (0, 2)]],
    # The surest token first: t2 (.6), t1 (.5), t0 (.4). First choices: t2 -> 2 place 0, t1 -> 0 place 0, t0
    # -> 0 place 1. Second ones: t2 -> 0 place 2 (dropped), t1 -> 2 place 1, t0 -> 2 place 2 (dropped).
    "priority": [[(0, 1), (2, 2)], [(0, 0), (2, 1)], [(2, 0), (0, 2)]],
    # Both choices of t0, then of t1, then of t2: t0 -> 0 place 0 and 2 place 0; t1 -> 0 place 1 and 2 place
    # 1; t2 -> 2 place 2 and 0 place 2 (both dropped).
    "token": [[(0, 0), (2, 0)], [(0, 1), (2, 1)], [(2, 2), (0, 2)]],
}


@pytest.mark.parametrize("drop_order", GOLDEN)
def test_golden_slots(drop_order):
    plan = assign_slots(make_routing(GATES, 2), capacity=2, drop_order=drop_order)
    golden = GOLDEN[drop_order]
    expected_seats = {seat: token for token in range(3) for seat in golden[token] if seat[1] < 2}
    assert seats_of(plan) == expected_seats
    np.testing.assert_array_equal(plan.kept_GTK, [[place < 2 for _, place in row] for row in golden])


@pytest.mark.parametrize("drop_order", GOLDEN)
def test_the_oracle_knows_the_golden_slots(drop_order):
    expert_TK = [oracle.best(row, 2) for row in GATES]
    slot_TK, _, _ = oracle.seat(expert_TK, 2, drop_order, top_prob_T=[max(row) for row in GATES])
    found = [[(expert_TK[t][j], slot_TK[t, j]) for j in range(2)] for t in range(3)]
    assert found == GOLDEN[drop_order]


# Four tokens, three experts, one choice.
LOSS_GATES = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


def test_golden_balance_loss():
    # The best experts are 0, 2, 2, 0: f = (.5, 0, .5). P = column means = (1.7, 1.1, 1.2) / 4 = (.425, .275,
    # .3). E * sum f P = 3 * (.5 * .425 + .5 * .3) = 3 * .3625 = 1.0875.
    load_E, prob_sum_E = jnp.array([2.0, 0.0, 2.0]), LOSS_GATES.sum(0)
    loss = balance_loss(load_E, prob_sum_E, jnp.float32(4), jnp.float32(4))
    assert float(loss) == pytest.approx(1.0875, rel=1e-6)


def test_golden_importance_loss():
    # Column sums (1.7, 1.1, 1.2), mean 4/3; squared deviations .134444 + .054444 + .017778 = .206667,
    # variance / 3 = .0688889; over the squared mean 1.777778: .03875 (float32 gates give .03874999).
    assert float(importance_loss(LOSS_GATES.sum(axis=0))) == pytest.approx(0.03874999, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_perfect_balance_is_one_for_every_k(k):
    # 8 tokens of 4 experts, uniform probabilities, each expert chosen 8 k / 4 = 2 k times. f = 2k / 8k = 1/4,
    # P = 1/4, so the loss is 4 * 4 * (1/4 * 1/4) = 1; dividing the load by the 8 tokens instead of the 8k
    # choices would give k.
    load_E, prob_sum_E = jnp.full(4, 2.0 * k), jnp.full(4, 8 * 0.25)
    loss = balance_loss(load_E, prob_sum_E, jnp.float32(8), jnp.float32(8 * k))
    assert float(loss) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_collapse_is_num_experts(k):
    # Everybody surely at one expert (k=1): f = P = (1, 0, 0, 0), 4 * 1 = 4. At k=2 the load halves over two
    # experts and so does the probability: 4 * (1/2 * 1/2 * 2) = 2.
    load_E = jnp.array([8.0, 8.0, 0.0, 0.0]) if k == 2 else jnp.array([8.0, 0.0, 0.0, 0.0])
    loss = balance_loss(load_E, load_E / k, jnp.float32(8), jnp.float32(8 * k))
    assert float(loss) == pytest.approx(4 / k, rel=1e-6)


def test_golden_z_loss():
    # Logits (0, 0) and (ln 3, ln 5): logsumexp = ln 2 and ln 8 = 3 ln 2; the mean square is (1 + 9) / 2 *
    # ln(2)**2.
    logits_TE = jnp.array([[0.0, 0.0], [np.log(3.0), np.log(5.0)]])
    z_sum = sum(oracle.log_sum_exp(np.asarray(row, float)) ** 2 for row in logits_TE)
    assert float(z_loss(jnp.float32(z_sum), jnp.float32(2))) == pytest.approx(5 * np.log(2.0) ** 2, rel=1e-6)
    routing = sm.route(logits_TE, sm.MoEConfig(d_model=2, d_ff=2, num_experts=2))
    np.testing.assert_array_equal(
        routing.logits_GTE, logits_TE
    )  # handed on as they are, not as probabilities


def test_golden_load_loss():
    # Smooth loads (2.5, 1, .5), mean 4/3: squared deviations 1.361111 + .111111 + .694444 = 2.166667, a third
    # of it over 16/9: .40625.
    assert float(load_loss(jnp.array([2.5, 1.0, 0.5]))) == pytest.approx(0.40625, rel=1e-6)
    assert load_loss(jnp.array([[2.0, 2.0], [0.0, 0.0]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sequences_per_group", [1, 3])
def test_golden_sequence_balance_loss(sequences_per_group):
    # The router is the identity. Tokens A = (ln 3, 0), B = (0, ln 3): probabilities (3/4, 1/4), (1/4, 3/4).
    # Row AA: f = (1, 0), P = (3/4, 1/4): 2 * 3/4 = 1.5. Row AB: f = P = (1/2, 1/2): 1. A row of padding is no
    # sequence. Mean 1.25, however rows are grouped. All three A and one B together: f = (3/4, 1/4), P = (5/8,
    # 3/8): 2 * (15 + 3) / 32 = 1.125.
    a, b = [np.log(3.0), 0.0], [0.0, np.log(3.0)]
    config = sm.MoEConfig(
        d_model=2, d_ff=2, num_experts=2, sequences_per_group=sequences_per_group, sequence_balance_coef=0.5
    )
    params = sm.init_moe(jax.random.key(0), config)._replace(router=jnp.eye(2))
    mask = jnp.array([[True, True], [True, True], [False, False]])
    _, aux = moe(params, jnp.array([[a, a], [a, b], [b, b]]), config, mask=mask)
    assert (float(aux.sequence_balance_sum), float(aux.sequences)) == (pytest.approx(2.5), 2.0)
    metrics = summarize(aux)
    assert float(metrics["sequence_balance_loss"]) == pytest.approx(1.25, rel=1e-6)
    assert float(metrics["balance_loss"]) == pytest.approx(1.125, rel=1e-6)
    assert float(sm.aux_loss(aux, config)) == pytest.approx(0.5 * 1.25 + 0.01 * 1.125, rel=1e-6)
