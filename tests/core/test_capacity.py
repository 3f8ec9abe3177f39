"""Seats per expert, and how many choices blind chance would drop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.dispatching.chance import expected_drop, expected_drop_table
from switchmoe.seats import capacity

from . import oracle


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "multiple_of", "expected"),
    [
        (8, 4, 1, 1.0, 1, 2),  # 8 / 4
        (8, 4, 1, 1.25, 1, 3),  # 2.5 is rounded up, never down or half to even
        (10, 4, 1, 1.0, 1, 3),  # 2.5 again, without a factor
        (8, 4, 2, 1.0, 1, 4),  # two choices a token: 16 / 4
        (10, 4, 1, 1.5, 1, 4),  # scale first: ceil(3.75); ceil(2.5) * 1.5 would be 4.5 -> 5
        (10, 4, 3, 1.25, 1, 10),  # 37.5 / 4 = 9.375
        (10, 4, 3, 2.0, 1, 10),  # 15 seats for 10 tokens: 5 could never be taken
        (4, 4, 4, 8.0, 1, 4),
        (1, 64, 1, 1.25, 1, 1),  # one-token decoding always has a seat
        (1, 64, 2, 0.01, 1, 1),
        (128, 16, 1, 1.25, 1, 10),
        (128, 16, 1, 1.25, 8, 16),  # 10 -> 16
        (128, 16, 1, 1.0, 8, 8),  # 8 is a multiple of 8 already
        (6, 4, 1, 1.0, 8, 6),  # 1.5 -> 2 -> 8, and only 6 tokens to seat
        (1024, 2048, 1, 1.0, 1, 1),  # Switch-C on one chip: half a token an expert
        (1100, 10, 1, 1.1, 1, 121),  # 1.1 * 1100 / 10 is 121; in binary 121.00000000000001
        (30, 3, 1, 0.7, 1, 7),  # 0.7 * 10 is 7
        (100, 10, 2, 0.5, 1, 10),  # 0.5 * 200 / 10
    ],
)
def test_capacity_by_hand(tokens, experts, k, factor, multiple_of, expected):
    seats = capacity(tokens, experts, k, factor, multiple_of)
    assert seats == expected and isinstance(seats, int)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 50), st.integers(1, 16))
def test_capacity_stays_between_need_and_tokens(tokens, experts, k, factor, multiple_of):
    k = min(k, experts)
    seats = capacity(tokens, experts, k, factor, multiple_of)
    assert 1 <= seats <= tokens
    assert seats == tokens or (
        seats % multiple_of == 0 and seats >= factor * tokens * k / experts * (1 - 1e-12)
    )
    assert seats < factor * tokens * k / experts + 1 + multiple_of


def test_capacity_refuses_no_seats():
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="factor"):
            capacity(8, 4, 1, factor)


# ANCHORS section 2: per cent of tokens dropped under ideal random routing, by mean tokens per expert.
FACTORS = (1.0, 1.1, 1.25, 1.5)
FLOOR = {
    8: (13.96, 8.87, 5.32, 1.62),
    16: (9.92, 5.08, 2.30, 0.32),
    64: (4.98, 1.37, 0.13, 0.0),
    256: (2.49, 0.15, 0.0, 0.0),
}


@pytest.mark.parametrize("per_expert", FLOOR)
def test_chance_floor_matches_the_table(per_expert):
    # The table is the limit of many experts: a queue is Poisson(m), and the share is E[max(0, queue - C)] /
    # m.
    experts = 4096
    tokens = per_expert * experts
    for factor, percent in zip(FACTORS, FLOOR[per_expert], strict=True):
        seats = capacity(tokens, experts, 1, factor)
        assert seats == math.ceil(round(factor * per_expert, 6))
        share = 100 * float(expected_drop(tokens, experts, 1, seats)) / tokens
        assert share == pytest.approx(percent, abs=0.01), (factor, share)


def test_chance_floor_of_switch_c():
    # Half a token an expert and one seat each: (e**-.5 - .5) / .5 = 21.3%.
    share = float(expected_drop(1024, 2048, 1, 1)) / 1024
    assert share == pytest.approx((math.exp(-0.5) - 0.5) / 0.5, abs=2e-4)


def test_chance_floor_by_hand():
    # Two tokens, two experts, one seat each: half of the time both go to the same one, and one choice drops.
    assert float(expected_drop(2, 2, 1, 1)) == pytest.approx(0.5, rel=1e-5)
    # Three tokens: all at one expert (2 of 8 ways) drops 2, else 1 drops: .25 * 2 + .75 * 1 = 1.25.
    assert float(expected_drop(3, 2, 1, 1)) == pytest.approx(1.25, rel=1e-5)
    # k = E: every token is at every expert, nothing is left to chance. 5 tokens, 3 seats, 2 experts: 4.
    assert float(expected_drop(5, 2, 2, 3)) == pytest.approx(4.0, rel=1e-6)
    # As many seats as tokens: nothing drops. No tokens: nothing drops.
    assert float(expected_drop(5, 4, 1, 5)) == pytest.approx(0.0, abs=1e-5)
    assert float(expected_drop(0, 4, 1, 5)) == 0.0


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "seats"),
    [(24, 6, 1, 4), (24, 6, 2, 8), (17, 5, 3, 11), (40, 8, 2, 15), (64, 2, 1, 32)],
)
def test_chance_floor_against_simulation_and_sum(tokens, experts, k, seats):
    # The closed form against the plain sum, and both against tokens that really draw k different experts
    # blindly.
    expected = oracle.expected_drop(tokens, experts, k, seats)
    assert float(expected_drop(tokens, experts, k, seats)) == pytest.approx(expected, rel=1e-9)
    rng = np.random.default_rng(0)
    choice_RTK = np.argsort(rng.random((4000, tokens, experts)), axis=-1)[..., :k]
    load_RE = (choice_RTK[..., None] == np.arange(experts)).sum((1, 2))
    drops_R = np.maximum(load_RE - seats, 0).sum(-1)
    error = drops_R.std() / math.sqrt(len(drops_R))
    assert abs(drops_R.mean() - expected) < 4 * error


@pytest.mark.parametrize(("experts", "k", "seats"), [(3, 1, 2), (3, 2, 2), (4, 1, 1), (2, 2, 3)])
def test_chance_floor_of_shortened_groups(experts, k, seats):
    # Padding shortens a group: entry n of the table is the floor of n real tokens.
    table = expected_drop_table(9, experts, k, seats)
    expected = [oracle.expected_drop(n, experts, k, seats) for n in range(10)]
    np.testing.assert_allclose(table, expected, rtol=1e-9, atol=1e-12)
