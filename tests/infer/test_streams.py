"""Tokens as they come, where rows end, how often something is compiled, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from switchmoe.config import MoEConfig
from switchmoe.data import ByteTokenizer
from switchmoe.infer import GenerateConfig, TextStream, bucket_length, generate, prepare, stream
from switchmoe.infer.generate import prepare_model
from switchmoe.infer.prompts import encode_prompts, pad
from switchmoe.infer.request import make_request
from switchmoe.infer.seating import choose_seating
from switchmoe.models import with_moe
from switchmoe.parallel import Layout, make_mesh
from tests.infer.worlds import (
    CAPACITY,
    CONFIGS,
    DENSE,
    DRAWN,
    DROPLESS,
    ENCODER,
    GREEDY,
    PROMPTS,
    model_of,
    random_model,
)

KEY = jax.random.key(7)


def test_a_stream_is_the_same_tokens():
    model = model_of(DENSE)
    free = generate(model, PROMPTS, DRAWN, key=KEY)
    stops = tuple(int(token) for token in free.tokens_BN[:2, 3])  # somewhere inside two of the rows
    for stop_tokens in ((), stops):
        config = dataclasses.replace(DRAWN, stop_tokens=stop_tokens)
        whole = generate(model, PROMPTS, config, key=KEY)
        pieces = list(stream(model, PROMPTS, config, key=KEY))
        np.testing.assert_array_equal(np.stack([piece.tokens_B for piece in pieces], 1), whole.tokens_BN)
        log_probs_BN = np.stack([piece.log_probs_B for piece in pieces], 1)
        np.testing.assert_allclose(log_probs_BN, whole.log_probs_BN, atol=1e-5)
        live_BN = np.stack([piece.live_B for piece in pieces], 1)
        np.testing.assert_array_equal(live_BN.sum(1), whole.lengths_B)
        np.testing.assert_array_equal(pieces[-1].ended_B, [reason == "stop" for reason in whole.why])


def test_a_row_ends_with_its_stop_token():
    model = model_of(DENSE)
    free = generate(model, PROMPTS, DRAWN, key=KEY)
    stop = int(free.tokens_BN[1, 2])
    config = dataclasses.replace(DRAWN, stop_tokens=(stop, 22), pad_token=21)
    done = generate(model, PROMPTS, config, key=KEY)
    assert done.why[1] == "stop" and done.lengths_B[1] <= 3
    for row, (new, reason) in enumerate(zip(done.rows(), done.why, strict=True)):
        np.testing.assert_array_equal(new, free.tokens_BN[row, : len(new)])  # the same up to the end
        assert (reason == "stop") == (new[-1] in config.stop_tokens)
        assert not set(new[:-1].tolist()) & set(config.stop_tokens)
        assert (done.tokens_BN[row, len(new) :] == 21).all() and not done.log_probs_BN[row, len(new) :].any()
    # When all rows have ended, nothing more is computed.
    everything = tuple({int(token) for token in free.tokens_BN[:, :2].reshape(-1)})
    short = generate(model, PROMPTS, dataclasses.replace(config, stop_tokens=everything), key=KEY)
    assert short.why == ("stop",) * 3 and short.tokens_BN.shape[1] == short.lengths_B.max() <= 2
    banned = generate(model, PROMPTS, dataclasses.replace(DRAWN, banned_tokens=(stop, 1, 2)), key=KEY)
    assert not {stop, 1, 2} & set(banned.tokens_BN.reshape(-1).tolist())


def test_one_program_serves_every_prompt_of_a_shape(compilations):
    model = model_of(DENSE)
    generate(model, PROMPTS, DRAWN, key=KEY)
    before = len(compilations)
    for prompts, changes in [
        (PROMPTS[::-1], dict()),
        ([[4] * 16, [5] * 15, [6]], dict(temperature=0.3, top_p=0.5)),
        (PROMPTS, dict(max_new_tokens=16, stop_tokens=(1, 2, 3))),
    ]:
        generate(model, prompts, dataclasses.replace(DRAWN, **changes), key=jax.random.key(9))
    assert len(compilations) == before
    generate(model, [[3] * 17, *PROMPTS[1:]], DRAWN, key=KEY)
    assert len(compilations) > before  # the listener does hear a compilation


def test_weights_are_no_part_of_the_program():
    model = model_of(DENSE)
    request, shape, _ = make_request(model.config, DRAWN, PROMPTS, key=KEY)
    programs, state = prepare_model(model, DRAWN, shape)
    traced = programs.run.trace(state, request)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state))
    constants = sum(np.size(constant) for constant in traced.jaxpr.consts)
    assert weights > 2000 and constants < 200


@pytest.fixture
def compilations():
    seen = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_buckets():
    lengths = [bucket_length(length) for length in range(1, 2000)]
    assert lengths == sorted(lengths)
    for length, bucket in enumerate(lengths, start=1):
        assert length <= bucket < max(length + 16, 1.25 * length) and bucket_length(bucket) == bucket
    assert len(set(lengths)) < 30
    assert [bucket_length(length) for length in (1, 16, 17, 128, 129, 257)] == [16, 16, 32, 128, 160, 320]


def test_prompts_of_every_kind():
    tokenizer = ByteTokenizer()
    a, b = [100, 101], [101]
    for prompts, expected in [
        ("ab", [a]),
        (["ab", "b"], [a, b]),
        (a, [a]),
        (np.array(a), [a]),
        ([a, b], [a, b]),
        ([np.array(a), np.array(b)], [a, b]),
        (np.array([a, a]), [a, a]),
    ]:
        assert [row.tolist() for row in encode_prompts(prompts, 259, tokenizer)] == expected
    ids, mask = pad([np.array(a, np.int32), np.array(b, np.int32)], 3, 4)
    np.testing.assert_array_equal(ids * mask, [[0, 0, *a], [0, 0, 0, *b], [0] * 4])
    np.testing.assert_array_equal(mask.sum(1), [2, 1, 0])
    ids, mask = pad([np.array(a, np.int32)], 1, 4, front=False)
    assert ids.tolist() == [[*a, 0, 0]] and mask.tolist() == [[True, True, False, False]]


def test_a_character_is_said_when_it_is_complete():
    text = "añ→😀b"
    said = TextStream(ByteTokenizer())
    pieces = [said.add(token) for token in ByteTokenizer().encode(text)]
    assert [piece for piece in pieces if piece] == list(text) and said.end() == ""
    said = TextStream(ByteTokenizer())
    assert [said.add(token) for token in ByteTokenizer().encode("é")[:1]] == [""] and said.end() == "\ufffd"
    assert TextStream(ByteTokenizer()).end() == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0, but must be at least 1"),
        (dict(temperature=-1.0), "temperature is -1.0, but must be a finite number of at least 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1.0, top_k=0), "top_k is 0, but must be at least 1"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0, but must be above 0 and at most 1"),
        (dict(top_p=0.5), "top_p=0.5 restricts what is drawn, but temperature=0 draws nothing"),
        (dict(top_k=5), "top_k=5 restricts what is drawn"),
        (dict(experts="droples"), "experts='droples' is not known; did you mean 'dropless'"),
    ],
)
def test_settings_that_do_not_fit(changes, said):
    with pytest.raises(ValueError, match=said):
        GenerateConfig(**changes)


@pytest.mark.parametrize(
    ("name", "prompts", "changes", "options", "said"),
    [
        (DENSE, [], {}, {}, "There is no prompt; give at least one"),
        (DENSE, [[1], []], {}, {}, "Prompt 1 is empty, or no single row"),
        (DENSE, ["text"], {}, {}, "Prompt 0 is a text, but there is no tokenizer"),
        (DENSE, [[23]], {}, {}, "Token id 23 lies outside the vocabulary of 23"),
        (DENSE, [[1.5]], {}, {}, "must be integers"),
        (DENSE, [[1]], dict(stop_tokens=(40,)), {}, "stop_tokens has the token 40, which lies outside"),
        (DENSE, [[1]], dict(banned_tokens=tuple(range(23))), {}, "bans the whole vocabulary"),
        (DENSE, [[1]], dict(temperature=1.0, top_k=24), {}, "top_k=24 is more than the vocabulary of 23"),
        (DENSE, [[1]], dict(temperature=1.0), {}, "draws tokens, which needs a key"),
        (DENSE, [[1]], {}, dict(row_ids=[1, 2]), "There are 1 prompts and 2 row_ids"),
        (DENSE, [[1]], {}, dict(row_ids=[-1]), "row_ids must be whole numbers"),
        (DENSE, [[1]], {}, dict(decoder_prompts=[[1]]), "This model has no encoder"),
        (ENCODER, [[1]], {}, dict(decoder_prompts=[[1], [2]]), "There are 1 prompts and 2 decoder_prompts"),
        (ENCODER, [[1]], {}, dict(decoder_prompts=[[]]), "Decoder prompt 0 is empty"),
    ],
)
def test_requests_that_do_not_fit(compilations, name, prompts, changes, options, said):
    for function in (generate, stream):  # a stream says so before its first token is asked for
        with pytest.raises(ValueError, match=said):
            function(model_of(name), prompts, dataclasses.replace(GREEDY, **changes), **options)


def test_experts_without_limits_can_be_given_some():
    # Whoever comes first is seated first, so that no later token decides about an earlier one.
    model = model_of(DROPLESS)
    assert model.config.moe.drop_order == "choice" and model.config.moe.top_k == 2
    limited = choose_seating(model, "capacity").config.moe
    assert (limited.dispatch, limited.drop_order) == ("gather", "token")
    assert choose_seating(model, "dropless") is model is choose_seating(model, None)


def test_what_would_let_rows_see_each_other_is_refused():
    layout = Layout(make_mesh(data=1), ragged_buffer_factor=1.5)
    with pytest.raises(ValueError, match="ragged_buffer_factor=1.5 drops tokens when other rows crowd"):
        generate(model_of(DROPLESS), PROMPTS, GREEDY, layout=layout)
    leaking = MoEConfig(d_model=16, d_ff=24, num_experts=4, router="expert_choice")
    leaking = dataclasses.replace(CONFIGS[CAPACITY], moe=leaking, allow_future_leak=True)
    with pytest.raises(ValueError, match="a text would depend on the rows beside it"):
        generate(random_model(leaking), PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="laid out for one device"):
        generate(prepare(model_of(DROPLESS)), PROMPTS, GREEDY, layout=Layout(make_mesh(data=1)))
    shared = dataclasses.replace(model_of(DROPLESS).config.moe, sequences_per_group=3)
    grouped = with_moe(model_of(DROPLESS), shared)  # only training cares about groups of rows
    done, alone = (generate(model, PROMPTS, GREEDY) for model in (grouped, model_of(DROPLESS)))
    np.testing.assert_array_equal(done.tokens_BN, alone.tokens_BN)
