"""Span corruption: short spans of a text are cut out of it, and the model writes them from what is left."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer

from switchmoe.data.batch import Batch
from switchmoe.data.tokenizer import BYTES, SpecialTokens


class SpanLengths(NamedTuple):
    """How a text of so many tokens is parted: all of it is a function of its length.

    `noise` tokens are cut out in `spans` pieces. `source` is what the encoder reads (the tokens that stay, a
    sentinel a span and an end token), `target` what the decoder writes (the spans, each behind its sentinel,
    and an end token).
    """

    noise: int
    spans: int
    source: int
    target: int


class SpanCorruption(NamedTuple):
    """What is cut out of a text: a share of its tokens, in spans of a mean length, for a source of a length.

    `noise_density` is at most one half and `mean_span` at least 1, so that spans never have to touch.
    """

    noise_density: float
    mean_span: float
    source_length: int

    @property
    def raw_length(self) -> int:
        """Tokens of text that a row is made from."""
        return raw_length(self.source_length, self.noise_density, self.mean_span)

    @property
    def target_length(self) -> int:
        """Tokens that the decoder writes for a whole row."""
        return self.lengths(self.raw_length).target

    def lengths(self, tokens: int) -> SpanLengths:
        """Say how a text of so many tokens is parted; see `span_lengths`."""
        return span_lengths(tokens, self.noise_density, self.mean_span)


def span_lengths(tokens: int, noise_density: float, mean_span: float) -> SpanLengths:
    """Say how many of so many tokens are cut out, in how many spans, and how long source and target get.

    Both numbers are rounded to the nearest, and are at least 1. One token more makes the source longer by 0
    or 1. The proportions are T5's: of 568 tokens 85 in 28 spans, a source of 512 and a target of 114. Source:
    Raffel et al. 2020, sections 3.1.4 and 3.3.4, https://arxiv.org/abs/1910.10683; the figure there shows one
    more sentinel at the end of the target, which the published models' data did not have.
    """
    noise = max(1, round(tokens * noise_density))
    spans = max(1, round(noise / mean_span))
    return SpanLengths(noise, spans, source=tokens - noise + spans + 1, target=noise + spans + 1)


def raw_length(source_length: int, noise_density: float, mean_span: float) -> int:
    """Find the tokens of text that a source of this length is made from: 568 for 512 in T5's proportions.

    They are as many as still fit, and what they make fits exactly.
    """
    tokens = source_length - 1  # a source is longer than its text by at most one
    while span_lengths(tokens + 1, noise_density, mean_span).source <= source_length:
        tokens += 1
    return tokens


def corrupt(
    ids_N: Integer[np.ndarray, " N"],
    corruption: SpanCorruption,
    key: Sequence[int],
    special: SpecialTokens = BYTES,
) -> tuple[Int32[np.ndarray, " P"], Int32[np.ndarray, " S"]]:
    """Cut spans out of a text, each replaced by a sentinel; returns (source, target), both with an end token.

    The i-th span from the left gets the i-th sentinel, and stands behind it in the target. All ways to choose
    spans that do not touch are equally likely: the cuts that part the noise into spans, and the gaps between
    the other tokens (both ends too) where the spans stood. T5's own recipe lets no text begin with a span,
    and every one end with one.

    `key` are whole numbers not below 0, say (seed, epoch, row): the same ones, the same spans, whatever the
    version of numpy, which keeps the streams of its bit generators as they are. ids_N has no padding and at
    least one token.
    """
    noise, spans, _, _ = corruption.lengths(len(ids_N))
    gaps = len(ids_N) - noise + 1
    draw = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(noise - 1 + gaps)
    cut_K = 1 + _choose(draw[: noise - 1], spans - 1)
    gap_K = _choose(draw[noise - 1 :], spans)

    start_K = np.concatenate([np.zeros(1, np.int64), cut_K])  # of each span in the noise
    length_K = np.diff(np.append(start_K, noise))
    is_noise_N = np.zeros(len(ids_N), bool)
    is_noise_N[np.repeat(gap_K, length_K) + np.arange(noise)] = True
    sentinel_K, end = np.array(special.sentinels[:spans], np.int32), np.array([special.eos], np.int32)
    ids_N = ids_N.astype(np.int32)
    source_P = np.insert(ids_N[~is_noise_N], gap_K, sentinel_K)
    target_S = np.insert(ids_N[is_noise_N], start_K, sentinel_K)
    return np.concatenate([source_P, end]), np.concatenate([target_S, end])


def _choose(draw_N: np.ndarray, count: int) -> Int64[np.ndarray, " K"]:
    """Choose so many of N places, each choice equally likely, from a random number a place; sorted."""
    return np.sort(np.argsort(draw_N, kind="stable")[:count])


def make_span_batch(
    tokens_BR: Integer[np.ndarray, "B R"],
    domain_B: Integer[np.ndarray, " B"],
    corruption: SpanCorruption,
    keys: Sequence[Sequence[int]],
    special: SpecialTokens = BYTES,
) -> Batch:
    """Corrupt packed rows, each with its key: an encoder's source, and a decoder's inputs and targets.

    tokens_BR are rows of `corruption.raw_length` tokens, as ids plus `special.shift`, padded with 0 at their
    ends; a row without a token stays empty. A row is one text, whatever documents are in it: the encoder sees
    all of it, and the end tokens of its documents are tokens like others. The decoder reads the target one
    place late, behind a padding token, which is the sign to start and no padding: mask_BS is True there.
    """
    rows = len(tokens_BR)
    source_BP = np.full((rows, corruption.source_length), special.pad, np.int32)
    targets_BS = np.full((rows, corruption.target_length), special.pad, np.int32)
    source_mask_BP, mask_BS = np.zeros(source_BP.shape, bool), np.zeros(targets_BS.shape, bool)
    for row, (tokens_R, key) in enumerate(zip(tokens_BR, keys, strict=True)):
        filled = int(np.count_nonzero(tokens_R))
        if not filled:
            continue
        ids_N = tokens_R[:filled].astype(np.int32) - special.shift
        source, target = corrupt(ids_N, corruption, key, special)
        source_BP[row, : len(source)], source_mask_BP[row, : len(source)] = source, True
        targets_BS[row, : len(target)], mask_BS[row, : len(target)] = target, True
    ids_BS = np.pad(targets_BS[:, :-1], ((0, 0), (1, 0)), constant_values=special.pad)
    return Batch(
        ids_BS=ids_BS,
        targets_BS=targets_BS,
        segments_BS=mask_BS.astype(np.int32),
        positions_BS=np.where(mask_BS, np.arange(ids_BS.shape[1], dtype=np.int32), 0),
        weight_BS=mask_BS.astype(np.float32),
        mask_BS=mask_BS,
        domain_B=domain_B.astype(np.int32),
        source_BP=source_BP,
        source_mask_BP=source_mask_BP,
    )
