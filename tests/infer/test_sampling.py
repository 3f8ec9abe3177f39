"""Which tokens may be drawn, how often each one is, and that a row draws by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from switchmoe.infer.sampling import (
    choose_best,
    draw_token,
    keep_top_k,
    keep_top_p,
    log_probs,
    row_keys,
    step_keys,
)

B, V = 3, 7
# Few different values, so that equal scores are common.
SCORES = hnp.arrays(np.float32, (B, V), elements=st.integers(-6, 6).map(lambda n: n / 2))
top_k = jax.jit(keep_top_k, static_argnames="k")
top_p = jax.jit(keep_top_p)


@functools.partial(jax.jit, static_argnames="top_k")
def draw(scores, ids, step=0, **options):
    """Draw with the keys that the rows of these ids have at a step."""
    return draw_token(scores, step_keys(row_keys(jax.random.key(5), ids), step), **options)


def by_rank(scores_V):
    """Token ids, best first; the lower id first among equals."""
    return sorted(range(len(scores_V)), key=lambda token: (-scores_V[token], token))


def probabilities(scores_V):
    weights = [np.exp(float(score) - max(map(float, scores_V))) for score in scores_V]
    return [weight / sum(weights) for weight in weights]


def nucleus(scores_V, p):
    """The smallest set of best tokens that has a mass of p, and by how much its size was decided."""
    probs, mass, kept, margin = probabilities(scores_V), 0.0, [], np.inf
    for token in by_rank(scores_V):
        kept.append(token)
        mass += probs[token]
        margin = min(margin, abs(mass - p))
        if mass >= p:
            break
    return set(kept), margin


def kept(scores_V):
    return {token for token, score in enumerate(np.asarray(scores_V)) if score > -np.inf}


@given(scores=SCORES, k=st.integers(1, V + 2))
def test_top_k_keeps_the_k_best(scores, k):
    left = top_k(scores, k=k)
    for row in range(B):
        assert kept(left[row]) == set(by_rank(scores[row])[:k])
        for token in kept(left[row]):
            assert left[row, token] == scores[row, token]


@given(scores=SCORES, p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_has_the_mass(scores, p):
    left = top_p(scores, p)
    for row in range(B):
        expected, margin = nucleus(scores[row], p)
        assume(margin > 1e-5)  # float32 may round the last sum either way
        assert kept(left[row]) == expected
        assert all(left[row, token] == scores[row, token] for token in expected)


@given(scores=SCORES, low=st.floats(0.05, 0.9), more=st.floats(0.0, 0.1))
def test_a_larger_p_keeps_no_less(scores, low, more):
    small, large = top_p(scores, low), top_p(scores, low + more)
    assert all(kept(small[row]) <= kept(large[row]) for row in range(B))


def test_the_ends_of_top_p():
    scores = np.full((B, V), -30.0, np.float32)
    scores[0, 1] = 30.0
    assert kept(top_p(scores, 1e-6)[0]) == {1}
    # Summed in float32 the best token has all the mass already, and p = 1 keeps the others all the same.
    assert kept(top_p(scores, 1.0)[0]) == set(range(V))
    scores[0, 1] = -np.inf  # banned
    assert kept(top_p(scores, 1.0)[0]) == {*range(V)} - {1} == kept(top_k(scores, k=V)[0])


def test_top_p_by_hand():
    # Probabilities .5, .25, .125, .125: a mass of .75 is reached by two tokens, .76 needs a third, the lower
    # id of two equal ones.
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([[0.125, 0.5, 0.125, 0.25, 0, 0, 0]] * B, np.float32))
    assert kept(top_p(scores, 0.74)[0]) == {1, 3}
    assert kept(top_p(scores, 0.76)[0]) == {0, 1, 3}
    assert kept(top_p(scores, 0.88)[0]) == {0, 1, 2, 3}


def test_the_best_token_and_its_log_probability():
    scores = jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    np.testing.assert_array_equal(choose_best(scores), [1, 0])
    expected = [np.log(probabilities(row)[token]) for row, token in zip(scores, (2, 1), strict=True)]
    np.testing.assert_allclose(log_probs(scores, jnp.array([2, 1])), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.5),
        dict(temperature=2.0, top_k=3),
        dict(temperature=1.5, top_k=4, top_p=0.7),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(options):
    scores = np.array([1.0, 0.0, 2.0, 1.5, -1.0, 0.5, 0.25])
    scaled = scores / options["temperature"]
    allowed = set(by_rank(scaled)[: options.get("top_k", V)])
    scaled = np.array([score if token in allowed else -np.inf for token, score in enumerate(scaled)])
    if "top_p" in options:  # of the k tokens' own probabilities
        inside, margin = nucleus(scaled, options["top_p"])
        assert margin > 1e-3
        scaled = np.array([score if token in inside else -np.inf for token, score in enumerate(scaled)])
    expected = np.array(probabilities(scaled))

    rows = 4000
    drawn = draw(np.tile(np.float32(scores), (rows, 1)), np.arange(rows), **options)
    count = np.bincount(np.asarray(drawn), minlength=V)
    assert set(np.flatnonzero(count)) == set(np.flatnonzero(expected)) != {0}
    # Within four standard deviations of a binomial count, each.
    spread = np.sqrt(rows * expected * (1 - expected))
    assert (np.abs(count - rows * expected) <= 4 * spread + 1e-9).all(), (count, rows * expected)


def test_a_small_temperature_is_the_best_token():
    scores = np.random.default_rng(2).normal(scale=50, size=(16, V)).astype(np.float32)
    for temperature in (1e-3, 1e-30):
        drawn = draw(scores, np.arange(16), temperature=temperature, top_p=0.9)
        np.testing.assert_array_equal(drawn, scores.argmax(axis=-1))


def test_a_rows_draw_is_its_own():
    scores = np.random.default_rng(4).normal(size=(16, V)).astype(np.float32)
    ids = np.arange(16) + 5

    def draws(rows, step):
        return np.asarray(draw(scores[rows], ids[rows], step, temperature=1.3))

    everyone = draws(np.arange(16), 3)
    for row in (9, 2):
        np.testing.assert_array_equal(draws(np.array([row] * 16), 3), everyone[[row] * 16])
    assert (draws(np.arange(16), 4) != everyone).any()  # another step, other noise
    # And another id, other noise.
    assert len(set(np.asarray(draw(scores[[0] * 16], ids, 3, temperature=1.3)).tolist())) > 1
