"""The seating plan against the oracle, and its properties, over random gates, masks and drop orders."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import unchecked

from . import oracle
from .worlds import assign_slots, make_routing, seats_of

ORDERS = ("choice", "token", "priority")
# A few sizes only, so that each compiles once: (tokens, experts, k, capacity).
SIZES = ((7, 4, 1, 2), (6, 3, 2, 3), (5, 5, 3, 1), (4, 2, 2, 4), (1, 3, 1, 1))


@st.composite
def cases(draw):
    """(gates, k, capacity, mask): gates from few values, so that ties are common."""
    tokens, experts, k, seats = draw(st.sampled_from(SIZES))
    gate = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75])
    gates = draw(
        st.lists(st.lists(gate, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens)
    )
    mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return np.array(gates, np.float32), k, seats, np.array(mask)


@pytest.mark.parametrize("drop_order", ORDERS)
@settings(max_examples=60)
@given(case=cases())
def test_plan_is_the_oracles(drop_order, case):
    gates, k, capacity, mask = case
    routing = make_routing(gates, k, mask)
    plan = assign_slots(routing, capacity=capacity, drop_order=drop_order)
    top_prob_T = [max(row) for row in gates]
    expert_TK = np.asarray(routing.expert_GTK)
    _, kept_TK, seats = oracle.seat(expert_TK, capacity, drop_order, mask, top_prob_T)
    np.testing.assert_array_equal(plan.kept_GTK, kept_TK)
    assert seats_of(plan) == {seat: token for seat, (token, _) in seats.items()}
    weight_EC = np.zeros((gates.shape[1], capacity), np.float32)
    for seat, (token, choice) in seats.items():
        weight_EC[seat] = routing.weight_GTK[token, choice]
    np.testing.assert_array_equal(plan.weight_GEC, weight_EC)


@pytest.mark.parametrize("drop_order", ORDERS)
@settings(max_examples=40)
@given(case=cases(), seed=st.integers(0, 99))
def test_choices_left_unused_are_as_if_never_made(drop_order, case, seed):
    gates, k, capacity, mask = case
    routing = make_routing(gates, k, mask)
    unused_TK = np.random.default_rng(seed).random((len(gates), k)) < 0.4
    expert_TK = np.asarray(routing.expert_GTK)
    routing = routing._replace(expert_GTK=jnp.where(unused_TK, gates.shape[1], expert_TK))
    plan = assign_slots(routing, capacity=capacity, drop_order=drop_order)
    asking_TK = np.where(unused_TK, oracle.NOBODY, expert_TK)
    _, kept_TK, seats = oracle.seat(asking_TK, capacity, drop_order, mask, [max(row) for row in gates])
    np.testing.assert_array_equal(plan.kept_GTK, kept_TK)
    assert seats_of(plan) == {seat: token for seat, (token, _) in seats.items()}
    assert (np.asarray(plan.slot_GTK)[~kept_TK] == gates.shape[1] * capacity).all()


@pytest.mark.parametrize("drop_order", ORDERS)
@settings(max_examples=40)
@given(case=cases())
def test_seating_rules(drop_order, case):
    gates, k, capacity, mask = case
    tokens, experts = gates.shape
    routing = make_routing(gates, k, mask)
    plan = assign_slots(routing, capacity=capacity, drop_order=drop_order)
    token_EC, slot_TK, kept_TK = (
        np.asarray(field) for field in (plan.token_GEC, plan.slot_GTK, plan.kept_GTK)
    )
    expert_TK = np.asarray(routing.expert_GTK)

    # A seat holds one token or nobody (T), and both tables tell the same story, seat by seat.
    assert token_EC.shape == (experts, capacity) and ((0 <= token_EC) & (token_EC <= tokens)).all()
    seat_from_slots = {}
    for token, choice in np.argwhere(kept_TK):
        expert, seat = divmod(int(slot_TK[token, choice]), capacity)
        assert expert == expert_TK[token, choice]
        assert (expert, seat) not in seat_from_slots, "two tokens in one seat"
        seat_from_slots[expert, seat] = int(token)
    assert seat_from_slots == seats_of(plan)
    # A choice without a seat points outside of the table.
    assert (slot_TK[~kept_TK] == experts * capacity).all()
    # Seats fill from the front, without holes, and a token never sits twice at an expert.
    taken_EC = token_EC < tokens
    assert (taken_EC[:, :-1] >= taken_EC[:, 1:]).all()
    for row in token_EC:
        sitting = row[row < tokens]
        assert len(set(sitting)) == len(sitting)
    # At most k seats a token; a masked token has none; an expert is full before it turns anyone away.
    assert all((token_EC == token).sum() <= k for token in range(tokens))
    assert not kept_TK[~mask].any()
    load_E = np.bincount(expert_TK[mask].reshape(-1), minlength=experts)
    np.testing.assert_array_equal(taken_EC.sum(-1), np.minimum(load_E, capacity))
    # Kept and dropped together are all choices of real tokens.
    dropped = (~kept_TK[mask]).sum()
    assert kept_TK.sum() + dropped == mask.sum() * k and dropped == np.maximum(load_E - capacity, 0).sum()
    # An empty seat weighs nothing.
    assert (np.asarray(plan.weight_GEC)[~taken_EC] == 0).all()


@pytest.mark.parametrize("drop_order", ORDERS)
def test_groups_are_seated_apart(drop_order):
    gates = np.random.default_rng(3).random((2, 3, 6, 4)).astype(np.float32)
    mask = np.random.default_rng(4).random((2, 3, 6)) < 0.8
    together = assign_slots(make_routing(gates, 2, mask), capacity=2, drop_order=drop_order)
    for a, b in np.ndindex(2, 3):
        alone = assign_slots(make_routing(gates[a, b], 2, mask[a, b]), capacity=2, drop_order=drop_order)
        for field, whole, part in zip(alone._fields, together, alone, strict=True):
            np.testing.assert_array_equal(whole[a, b], part, err_msg=field)


def test_plan_has_the_types_it_declares():
    plan = assign_slots(make_routing(np.random.default_rng(0).random((2, 6, 4)), 2), capacity=3)
    shapes = {name: (field.shape, field.dtype) for name, field in plan._asdict().items()}
    assert shapes == {
        "token_GEC": ((2, 4, 3), jnp.int32),
        "weight_GEC": ((2, 4, 3), jnp.float32),
        "slot_GTK": ((2, 6, 2), jnp.int32),
        "kept_GTK": ((2, 6, 2), jnp.bool_),
    }


def test_a_later_token_moves_an_earlier_one_only_where_documented():
    # Everybody wants expert 0, one seat. In token and choice order the first in the row has it, whoever
    # follows; by priority the surest has it, so the last token's probability decides about the first: it
    # leaks the future.
    timid, bold = [[0.6, 0.4], [0.7, 0.3]], [[0.6, 0.4], [0.55, 0.45]]
    for drop_order, winners in {"choice": (0, 0), "token": (0, 0), "priority": (1, 0)}.items():
        seated = [
            seats_of(assign_slots(make_routing(gates, 1), 1, drop_order))[0, 0] for gates in (timid, bold)
        ]
        assert tuple(seated) == winners, drop_order


@settings(max_examples=25)
@given(case=cases(), seed=st.integers(0, 99))
def test_token_order_never_looks_ahead(case, seed):
    # Cut the row anywhere: the seats of the tokens before the cut do not depend on what follows (choice order
    # with k > 1 does not promise this, token order does).
    gates, k, capacity, mask = case
    cut = np.random.default_rng(seed).integers(0, len(gates) + 1)
    other = gates.copy()
    other[cut:] = np.random.default_rng(seed).random(other[cut:].shape)
    plans = [
        assign_slots(make_routing(g, k, mask), capacity=capacity, drop_order="token") for g in (gates, other)
    ]
    np.testing.assert_array_equal(plans[0].slot_GTK[:cut], plans[1].slot_GTK[:cut])


def test_bad_arguments_are_refused_with_a_sentence():
    routing = make_routing([[0.6, 0.4]], 1)
    with pytest.raises(ValueError, match="capacity"):
        assign_slots(routing, capacity=0)
    with unchecked(), pytest.raises(ValueError, match="did you mean 'choice'"):
        assign_slots(routing, capacity=1, drop_order="choise")
