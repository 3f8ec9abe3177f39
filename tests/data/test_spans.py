"""Span corruption: T5's three numbers, one row worked by hand, and what holds for every text."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import switchmoe.data.spans as spans_module
from switchmoe.data import ByteTokenizer, DataConfig, Rows, SpanCorruption, batches, evaluation_batches
from switchmoe.data.spans import corrupt, make_span_batch, raw_length, span_lengths

T5 = SpanCorruption(noise_density=0.15, mean_span=3.0, source_length=512)
# Source and target of the tokens 100 to 119 with the key (0, 1, 2): 0.3 noise in spans of 2.
RECORDED = (
    [100, 383, 104, 382, 106, 107, 108, 109, 110, 111, 112, 113, 381, 116, 117, 118, 119, 1],
    [383, 101, 102, 103, 382, 105, 381, 114, 115, 1],
)
LAST = ByteTokenizer.vocab_size_with_sentinels - 1
densities = st.sampled_from([0.01, 0.15, 1 / 3, 0.5])
means = st.sampled_from([1.0, 1.5, 3.0, 20.0])


def is_sentinel(tokens):
    return tokens >= ByteTokenizer.vocab_size


def restored(source, target):
    """Put every span back where its sentinel stands, token by token."""
    assert source[-1] == target[-1] == ByteTokenizer.eos
    spans, text = {}, []
    for token in target[:-1].tolist():
        if token >= ByteTokenizer.vocab_size:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    for token in source[:-1].tolist():
        text += spans.pop(token) if token >= ByteTokenizer.vocab_size else [token]
    assert not spans
    return text


def test_t5_s_proportions():
    # 568 * 0.15 = 85.2: 85 tokens of noise, 85 / 3 = 28.3: 28 spans. 568 - 85 + 28 + 1 and 85 + 28 + 1.
    assert raw_length(512, 0.15, 3.0) == T5.raw_length == 568
    assert span_lengths(568, 0.15, 3.0) == (85, 28, 512, 114)
    assert T5.target_length == 114
    config = DataConfig(objective="span_corruption", sequence_length=512)
    assert (config.row_length, config.target_length, config.tokens_per_row) == (568, 114, 626)
    assert config.corruption == T5


def test_a_row_by_hand(monkeypatch):
    # Ten tokens, 0.3 of them noise: 3, in 3 / 1.5 = 2 spans. The 2 places to cut the noise have the numbers
    # 9 and 4, the smaller one wins: a span of 2 and one of 1. The 7 tokens that stay have 8 gaps, of which
    # numbers 0 and 5 are the smallest: one span before the first of them and one behind the fifth.
    class Numbers:
        def __init__(self, seeds):
            assert list(seeds.entropy) == [1, 2, 3]

        def random_raw(self, count):
            assert count == 10
            return np.array([9, 4, 1, 8, 8, 8, 8, 2, 8, 8], np.uint64)

    monkeypatch.setattr(spans_module.np.random, "Philox", Numbers)
    text = np.arange(100, 110, dtype=np.uint16)
    source, target = corrupt(text, SpanCorruption(0.3, 1.5, 10), (1, 2, 3))
    assert source.tolist() == [383, 102, 103, 104, 105, 106, 382, 108, 109, 1]
    assert target.tolist() == [383, 100, 101, 382, 107, 1]
    assert source.dtype == target.dtype == np.int32


@given(st.integers(8, 1200), densities, means)
def test_the_length_of_the_text_is_the_largest_that_fits_and_fits_exactly(length, density, mean):
    tokens = raw_length(length, density, mean)
    assert span_lengths(tokens, density, mean).source == length
    assert span_lengths(tokens + 1, density, mean).source == length + 1


@given(st.integers(1, 700), densities, means, st.integers(0, 2**32 - 1))
def test_source_and_target_are_the_text(tokens, density, mean, key):
    lengths = span_lengths(tokens, density, mean)
    if lengths.spans > ByteTokenizer.num_sentinels:
        return
    text = np.random.default_rng(key).integers(1, 259, tokens).astype(np.uint16)
    source, target = corrupt(text, SpanCorruption(density, mean, lengths.source), (key, 0, 7))
    assert restored(source, target) == text.tolist()
    assert (len(source), len(target)) == (lengths.source, lengths.target)
    # As many tokens as wanted, to the nearest, in as many spans; they do not touch, their marks count down.
    assert abs(lengths.noise - density * tokens) <= 0.5 or lengths.noise == 1
    assert abs(lengths.spans - lengths.noise / mean) <= 0.5 or lengths.spans == 1
    wanted = np.arange(LAST, LAST - lengths.spans, -1)
    for marked in (source, target):
        at = np.flatnonzero(is_sentinel(marked))
        np.testing.assert_array_equal(marked[at], wanted)
        assert (np.diff(at) > 1).all()
    assert target[0] == LAST and not is_sentinel(target[-2])


def test_every_choice_of_spans_is_as_likely_as_any_other():
    # 5 tokens, 0.5 of them noise: 2 (round half to even), in 2 spans of 1 that do not touch. The 3 others
    # have 4 gaps, so there are 6 choices, of 1,000 draws each: 3 to 5 standard deviations of 29 are allowed.
    seen = {}
    for key in range(6000):
        source, target = corrupt(np.arange(10, 15), SpanCorruption(0.5, 1.0, 6), (key,))
        cut_out = tuple(target[1:4:2].tolist())
        seen[cut_out] = seen.get(cut_out, 0) + 1
    assert len(seen) == 6 and all(b - a > 1 for a, b in seen), seen
    assert max(abs(count - 1000) for count in seen.values()) < 120, seen


def test_numpy_s_next_version_must_draw_the_same():
    # Recorded: a run that is resumed must find the spans it had.
    source, target = corrupt(np.arange(100, 120), SpanCorruption(0.3, 2.0, 18), (0, 1, 2))
    assert (source.tolist(), target.tolist()) == RECORDED


@pytest.mark.parametrize("filled", [0, 1, 2, 30, 39])
def test_a_batch_has_the_decoder_one_place_late_and_padding_that_counts_nowhere(filled):
    corruption = SpanCorruption(0.15, 3.0, 36)
    assert corruption.raw_length == 39 and corruption.target_length == 9
    tokens = np.zeros((2, 39), np.uint16)
    tokens[0, :filled] = np.arange(50, 50 + filled)
    tokens[1] = 77
    batch = make_span_batch(tokens, np.array([3, 1], np.uint8), corruption, [(5,), (6,)])
    assert batch.source_BP.shape == batch.source_mask_BP.shape == (2, 36)
    assert all(a.shape == (2, 9) for a in batch[:6])
    assert {name: a.dtype.name for name, a in batch._asdict().items()} == {
        "ids_BS": "int32",
        "targets_BS": "int32",
        "segments_BS": "int32",
        "positions_BS": "int32",
        "weight_BS": "float32",
        "mask_BS": "bool",
        "domain_B": "int32",
        "source_BP": "int32",
        "source_mask_BP": "bool",
    }
    lengths = corruption.lengths(filled) if filled else (0, 0, 0, 0)
    source = batch.source_BP[0, : lengths[2]]
    target = batch.targets_BS[0, : lengths[3]]
    if filled:
        assert restored(source, target) == list(range(50, 50 + filled))
    np.testing.assert_array_equal(batch.source_mask_BP[0], np.arange(36) < lengths[2])
    np.testing.assert_array_equal(batch.mask_BS[0], np.arange(9) < lengths[3])
    assert batch.source_mask_BP[1].all() and batch.mask_BS[1].all()
    np.testing.assert_array_equal(batch.weight_BS, batch.mask_BS)
    np.testing.assert_array_equal(batch.segments_BS, batch.mask_BS)
    np.testing.assert_array_equal(batch.positions_BS, np.arange(9) * batch.mask_BS)
    np.testing.assert_array_equal(batch.ids_BS[:, 0], 0)
    np.testing.assert_array_equal(batch.ids_BS[:, 1:], batch.targets_BS[:, :-1])
    np.testing.assert_array_equal(batch.domain_B, [3, 1])


def some_rows(count):
    tokens = np.random.default_rng(0).integers(3, 259, (count, T5.raw_length)).astype(np.uint16)
    return Rows(tokens, np.zeros(count, np.uint8))


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_spans_follow_from_seed_epoch_and_row():
    rows = some_rows(6)
    dealt = [batches(rows, 6, seed=seed, corruption=T5) for seed in (0, 0, 1)]
    assert same(dealt[0][9], dealt[1][9])
    parts = [batches(rows, 6, seed=0, process_index=i, process_count=3, corruption=T5)[9] for i in range(3)]
    assert same(dealt[0][9], [np.concatenate(fields) for fields in zip(*parts, strict=True)])
    # The same text (a row restored), the first row of two epochs or of two seeds: never the same spans.
    sources = {}
    for which, step in [(0, 0), (0, 1), (2, 0)]:
        batch = dealt[which][step]
        for source, target in zip(batch.source_BP, batch.targets_BS, strict=True):
            text = tuple(restored(source, target))
            sources.setdefault(text, set()).add(source.tobytes())
    assert sorted(sources) == sorted(tuple(row.tolist()) for row in rows.tokens)
    assert all(len(different) == 3 for different in sources.values())


def test_evaluation_cuts_the_same_spans_every_time():
    rows = some_rows(5)
    once, again = (evaluation_batches(rows, 2, corruption=T5) for _ in range(2))
    other = evaluation_batches(rows, 5, corruption=T5)
    assert len(once) == 3 and all(same(a, b) for a, b in zip(once, again, strict=True))
    joined = np.concatenate([batch.source_BP for batch in once])
    np.testing.assert_array_equal(joined[:5], other[0].source_BP)
    assert not joined[5].any() and not once[2].weight_BS[1].any() and not once[2].source_mask_BP[1].any()


def test_data_does_not_hold_a_step_up():
    dealt = batches(some_rows(100), 16, seed=0, corruption=T5)
    dealt[0]

    def seconds():
        start = time.process_time()
        for step in range(10):
            dealt[step]
        return time.process_time() - start

    assert 10 / min(seconds() for _ in range(5)) > 50  # batches a second; some hundreds are usual


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"objective": "spans"}, 'objective .spans. is not known; choose "next_token" or "span_corruption"'),
        ({"noise_density": 0.0}, "noise_density is 0.0; give a share above 0, at most 0.5"),
        ({"noise_density": 0.6}, "noise_density is 0.6; give a share"),
        ({"noise_density": float("nan")}, "noise_density is nan; give a share"),
        ({"mean_span": 0.5}, "mean_span is 0.5; a span has at least 1 token"),
        (
            {"sequence_length": 4096},
            "4096 tokens has 227 spans, but there are 125 sentinels .* raise mean_span",
        ),
        ({"objective": "next_token", "mean_span": 4.0}, "cut out, which the objective .next_token. does not"),
    ],
)
def test_what_cannot_be_cut_out(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        DataConfig(**{"objective": "span_corruption", **settings})
    assert str(caught.value).endswith(".")
