"""What generation says is what whole passes say, whatever else is in the batch, on one device and on many."""

import dataclasses

import jax
import numpy as np
import pytest

from switchmoe.infer import generate
from tests.infer.worlds import (
    CAPACITY,
    DENSE,
    DRAWN,
    DROPLESS,
    ENCODER,
    GREEDY,
    PROMPTS,
    model_of,
    whole_pass,
)

KEY = jax.random.key(7)


def check_greedy(name, prompts, done, *, source=None, steps=None):
    """Each of a row's first new tokens is the best by a whole pass over the row, and as probable."""
    rows = [[*prompt, *map(int, new)] for prompt, new in zip(prompts, done.rows(), strict=True)]
    scores, _ = whole_pass(name, rows, source=source)
    for row, prompt in enumerate(prompts):
        for step in range(9 if steps is None else steps[row]):
            at = scores[row, len(prompt) + step - 1]
            token = done.tokens_BN[row, step]
            assert at[token] > at.max() - 1e-5
            np.testing.assert_allclose(done.log_probs_BN[row, step], at[token], atol=1e-5)


def all_kept(trace):
    """Which tokens found all their seats, in every layer."""
    return np.asarray(trace.kept_LBSK).all(axis=(0, 3))


@pytest.mark.parametrize("name", [DROPLESS, DENSE])
def test_decoding_is_whole_passes(name):
    done = generate(model_of(name), PROMPTS, GREEDY)
    assert done.tokens_BN.shape == (3, 9) and done.why == ("length",) * 3 and done.texts is None
    check_greedy(name, PROMPTS, done)
    assert len(set(done.tokens_BN.reshape(-1).tolist())) > 4  # it says more than one thing


def test_a_prompt_drops_what_a_whole_pass_over_it_drops():
    # Seats go by the tokens of a prompt, not by what it is padded to: the first new token is that of a pass
    # over the prompt alone, where tokens are dropped.
    done = generate(model_of(CAPACITY), PROMPTS, GREEDY)
    scores, trace = whole_pass(CAPACITY, PROMPTS)
    assert not all(row[: len(prompt)].all() for row, prompt in zip(all_kept(trace), PROMPTS, strict=True))
    for row, prompt in enumerate(PROMPTS):
        at, token = scores[row, len(prompt) - 1], done.tokens_BN[row, 0]
        assert at[token] > at.max() - 1e-5
        np.testing.assert_allclose(done.log_probs_BN[row, 0], at[token], atol=1e-5)


def test_the_flag_says_whether_experts_are_limited():
    done = generate(model_of(CAPACITY), PROMPTS, GREEDY)
    freely = generate(model_of(CAPACITY), PROMPTS, dataclasses.replace(GREEDY, experts="dropless"))
    assert np.abs(freely.log_probs_BN[:, 0] - done.log_probs_BN[:, 0]).max() > 1e-3
    # A prompt of one token has a seat anyhow, and so has every token behind it.
    np.testing.assert_array_equal(freely.tokens_BN[2], done.tokens_BN[2])
    np.testing.assert_allclose(freely.log_probs_BN[2], done.log_probs_BN[2], atol=1e-5)
    said = dataclasses.replace(GREEDY, experts="capacity")  # what the model's config says anyhow
    np.testing.assert_array_equal(generate(model_of(CAPACITY), PROMPTS, said).tokens_BN, done.tokens_BN)
    assert model_of(CAPACITY).config.moe.dispatch == "gather"  # the model is as it was


def test_an_encoder_is_read_once_and_seen_by_every_token():
    done = generate(model_of(ENCODER), PROMPTS, GREEDY)
    _, trace = whole_pass(ENCODER, [[0, *map(int, new)] for new in done.rows()], source=PROMPTS)
    # A whole pass may drop a later token, which generation never does; up to there they are the same.
    alike = [int(np.append(row[:9], False).argmin()) for row in all_kept(trace)]
    assert min(alike) >= 2 and sum(alike) >= 9
    check_greedy(ENCODER, [[0]] * 3, done, source=PROMPTS, steps=alike)
    assert len({tuple(row) for row in done.tokens_BN.tolist()}) > 1  # what is read makes a difference
    starts = [[0, token] for token in (5, 6, 7)]
    begun = generate(model_of(ENCODER), PROMPTS, GREEDY, decoder_prompts=starts)
    check_greedy(ENCODER, starts, begun, source=PROMPTS, steps=[1] * 3)


@pytest.mark.parametrize(("name", "config"), [(DROPLESS, DRAWN), (CAPACITY, GREEDY)])
def test_a_row_does_not_see_the_batch(name, config):
    model, ids = model_of(name), [5, 6, 7]
    together = generate(model, PROMPTS, config, key=KEY, row_ids=ids)

    def check(row, done):
        np.testing.assert_array_equal(done.tokens_BN[1], together.tokens_BN[row])
        np.testing.assert_allclose(done.log_probs_BN[1], together.log_probs_BN[row], atol=1e-5)

    # One neighbour instead of two, which is so long that there is more padding, and says one thing.
    for row, other in ((0, 20), (1, 3), (2, 4)):
        batch = [[other] * 30, PROMPTS[row]]
        check(row, generate(model, batch, config, key=KEY, row_ids=[other, ids[row]]))
    np.testing.assert_array_equal(  # the same neighbours in another order
        generate(model, PROMPTS[::-1], config, key=KEY, row_ids=ids[::-1]).tokens_BN[::-1], together.tokens_BN
    )
    if config.temperature > 0:  # another id, or another key, is another draw
        for changes in (dict(row_ids=[8, 9, 10]), dict(key=jax.random.key(8))):
            other = generate(model, PROMPTS, config, **(dict(key=KEY, row_ids=ids) | changes))
            assert (other.tokens_BN != together.tokens_BN).any()
