"""overflow="next": who finds an expert full goes to the next best one with a free seat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmoe.dispatching import take_next_choice

from . import oracle
from .test_golden import GATES
from .test_slots import ORDERS, cases
from .worlds import (
    assert_close_to_peak,
    assign_slots,
    make_config,
    make_params,
    make_routing,
    make_x,
    moe_with_trace,
    summarize,
)

ONE_CHOICE = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.7, 0.2, 0.1]]


@pytest.mark.parametrize(
    ("drop_order", "experts"),
    [
        # One seat an expert, and everybody wants expert 0. In order of position t0 has it, t1 takes its next
        # best, 2 (.3), and t2 the next best that is free, 1.
        ("choice", [0, 2, 1]),
        ("token", [0, 2, 1]),
        # The surest first: t2 (.7) has it, t1 (.6) takes 2, and t0's next best, 1, is free.
        ("priority", [1, 2, 0]),
    ],
)
def test_golden_next_of_one_choice(drop_order, experts):
    got = take_next_choice(make_routing(ONE_CHOICE, 1), capacity=1, drop_order=drop_order)
    assert got[:, 0].tolist() == experts


@pytest.mark.parametrize(
    ("drop_order", "experts", "kept"),
    [
        # Two seats, choices t0: 0 2, t1: 0 2, t2: 2 0. First ones: t0 -> 0, t1 -> 0 (full), t2 -> 2. Second
        # ones: t0 -> 2 (full); t1 finds 2 full and takes 1; t2 finds 0 full and takes 1.
        ("choice", [[0, 2], [0, 1], [2, 1]], [[1, 1], [1, 1], [1, 1]]),
        # t0 -> 0 and 2, t1 -> 0 and 2, both full. t2 takes 1 for its first; for its second only 1 is free,
        # where it sits already, so that one is dropped.
        ("token", [[0, 2], [0, 2], [1, 0]], [[1, 1], [1, 1], [1, 0]]),
        # t2, t1, t0: t2 -> 2, t1 -> 0, t0 -> 0 (full). Second ones: t2 finds 0 full and takes 1, t1 -> 2
        # (full), t0 finds 2 full and takes 1.
        ("priority", [[0, 1], [0, 2], [2, 1]], [[1, 1], [1, 1], [1, 1]]),
    ],
)
def test_golden_next_of_two_choices(drop_order, experts, kept):
    routing = make_routing(GATES, 2)
    got = take_next_choice(routing, capacity=2, drop_order=drop_order)
    assert got.tolist() == experts
    plan = assign_slots(routing._replace(expert_GTK=got), capacity=2, drop_order=drop_order)
    assert plan.kept_GTK.astype(int).tolist() == kept


def test_golden_next_passes_over_padding_and_choices_not_used():
    # t0 is padding, so t1 has expert 0; t2's only choice is not used and stays so.
    routing = make_routing(ONE_CHOICE, 1, mask=[False, True, True])
    routing = routing._replace(expert_GTK=routing.expert_GTK.at[2].set(3))
    got = take_next_choice(routing, capacity=1)
    assert got[1:, 0].tolist() == [0, 3]


def seat_or_move(expert_TK, score_TE, capacity, drop_order, mask_T, top_prob_T):
    """Where every choice ends, {(token, choice): expert} of those that find a seat at all."""
    experts = len(score_TE[0])
    free_E, found = [capacity] * experts, {}
    for token, choice in oracle.queue(expert_TK, drop_order, mask_T, top_prob_T):
        wish = int(expert_TK[token][choice])
        if wish == experts:
            continue
        held = [expert for (t, _), expert in found.items() if t == token]
        free = [e for e in range(experts) if free_E[e] > 0 and e not in held]
        if free:
            got = wish if wish in free else max(free, key=lambda e: (score_TE[token][e], -e))
            found[token, choice] = got
            free_E[got] -= 1
    return found


@pytest.mark.parametrize("drop_order", ORDERS)
@settings(max_examples=40)
@given(case=cases(), seed=st.integers(0, 99))
def test_next_choice_is_the_oracles(drop_order, case, seed):
    gates, k, capacity, mask = case
    tokens, experts = gates.shape
    routing = make_routing(gates, k, mask)
    unused_TK = np.random.default_rng(seed).random((tokens, k)) < 0.2
    wish_TK = np.where(unused_TK, experts, np.asarray(routing.expert_GTK)).astype(np.int32)
    routing = routing._replace(expert_GTK=jnp.asarray(wish_TK))
    got_TK = np.asarray(take_next_choice(routing, capacity=capacity, drop_order=drop_order))
    moved = routing._replace(expert_GTK=jnp.asarray(got_TK))
    kept_TK = np.asarray(assign_slots(moved, capacity=capacity, drop_order=drop_order).kept_GTK)
    found = seat_or_move(wish_TK, gates, capacity, drop_order, mask, [max(row) for row in gates])

    assert {(t, j): int(got_TK[t, j]) for t, j in np.argwhere(kept_TK)} == found
    np.testing.assert_array_equal(got_TK == experts, unused_TK)
    for token in range(tokens):  # never twice at an expert, dropped or not
        named = got_TK[token][got_TK[token] < experts]
        assert len(set(named)) == len(named) or not mask[token]
    load_E = np.bincount(wish_TK[mask & np.ones(tokens, bool)].reshape(-1), minlength=experts + 1)[:experts]
    assert kept_TK.sum() >= np.minimum(load_E, capacity).sum()  # never fewer than without moving
    if (load_E <= capacity).all():
        np.testing.assert_array_equal(got_TK[mask], wish_TK[mask])
    if k == 1 and experts * capacity >= tokens:
        np.testing.assert_array_equal(kept_TK[mask], ~unused_TK[mask])  # no token left behind


def test_groups_move_apart():
    gates = np.random.default_rng(3).random((2, 3, 6, 4)).astype(np.float32)
    mask = np.random.default_rng(4).random((2, 3, 6)) < 0.8
    together = take_next_choice(make_routing(gates, 2, mask), capacity=2)
    for at in np.ndindex(2, 3):
        alone = take_next_choice(make_routing(gates[at], 2, mask[at]), capacity=2)
        np.testing.assert_array_equal(together[at], alone)


@pytest.mark.parametrize("options", [dict(), dict(top_k=2, drop_order="token", renormalize=True)])
def test_the_layer_weighs_the_expert_that_a_token_got(options):
    config = make_config(overflow="next", eval_capacity_factor=1.0, **options)
    params, x = make_params(1), make_x(1, 2, 6, 4)
    y, aux, trace = moe_with_trace(params, x, config)
    experts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.experts)
    expected, load_E, kept = np.zeros(x.shape), np.zeros(3), 0
    seats = 2 * config.top_k
    for g in range(2):
        logits_TE = np.asarray(x[g], np.float64) @ np.asarray(params.router, np.float64)
        wish_TK = np.array([oracle.best(row, config.top_k) for row in logits_TE])
        load_E += np.bincount(wish_TK.reshape(-1), minlength=3)
        found = seat_or_move(wish_TK, logits_TE, seats, config.drop_order, [True] * 6, None)
        assert {at: int(trace.expert_SK[g][at]) for at in found} == found
        assert any(found.get((t, j)) != wish_TK[t, j] for t, j in np.ndindex(wish_TK.shape))
        kept += len(found)
        named_TK = np.asarray(trace.expert_SK[g])
        for (token, choice), expert in found.items():
            probs = oracle.softmax(logits_TE[token])
            weight = probs[expert] / (probs[named_TK[token]].sum() if config.renormalize else 1.0)
            assert float(trace.weight_SK[g, token, choice]) == pytest.approx(weight, rel=1e-5)
            hidden = oracle.feed_forward(
                np.asarray(x[g, token], np.float64), experts.w_in_EDF[expert], experts.w_out_EFD[expert]
            )
            expected[g, token] += weight * hidden
    assert_close_to_peak(y, expected)
    np.testing.assert_array_equal(aux.load_E, load_E)  # what tokens wished for, so that losses push there
    assert float(aux.kept_E.sum()) == kept == 12 * config.top_k - float(aux.dropped)
    assert (np.asarray(aux.kept_E) <= 2 * seats).all()
    if config.top_k == 1:
        assert float(aux.dropped) == float(aux.unserved) == 0 == float(summarize(aux)["dropped_floor"])
    np.testing.assert_array_equal(trace.kept_SK.sum(), kept)
