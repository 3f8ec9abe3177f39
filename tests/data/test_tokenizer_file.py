"""Rows of the ids of another tokenizer, whose id 0 may be text; the library itself is used in tests/live."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from switchmoe.data import (
    ByteTokenizer,
    DataConfig,
    FileTokenizer,
    batches,
    corpus_fingerprint,
    load_packed,
    load_tokenizer,
    make_batch,
)
from switchmoe.data.packing import pack_documents

WORDS = ["the", "cat", "sat", "on", "a", "mat", "</s>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]


class WordTokenizer:
    """What is used of `tokenizers.Tokenizer`: words are tokens, numbered in the order of the file."""

    def __init__(self, words):
        self.words = words

    @classmethod
    def from_file(cls, path):
        with open(path) as file:
            return cls(json.load(file))

    def no_truncation(self):
        pass

    def no_padding(self):
        pass

    def get_vocab(self, with_added_tokens):
        return {word: number for number, word in enumerate(self.words) if word is not None}

    def token_to_id(self, word):
        return self.words.index(word) if word in self.words else None

    def encode(self, text, add_special_tokens):
        return types.SimpleNamespace(ids=[self.words.index(word) for word in text.split()])

    def encode_batch_fast(self, texts, add_special_tokens):
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.words[token] for token in ids)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tokenizer's folder, and a library that reads it."""
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=WordTokenizer))
    place = tmp_path / "published"
    place.mkdir()
    (place / "tokenizer.json").write_text(json.dumps(WORDS))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return place


@pytest.fixture
def config(folder, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("\f".join(["the cat sat on a mat", "the the the", "a cat"] * 9))
    return DataConfig(str(corpus), 8, 0.3, cache_dir=str(tmp_path / "cache"), tokenizer=str(folder))


def test_a_tokenizer_and_its_special_tokens(folder):
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, FileTokenizer) and tokenizer.vocab_size == 10
    assert tokenizer.special == (1, 0, 6, (7, 8, 9))
    assert tokenizer.encode("the cat").tolist() == [0, 1]
    assert tokenizer.decode([1, 2, 6]) == "cat sat"
    assert FileTokenizer(folder / "tokenizer.json", end_token="mat").eos == 5
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 6]}')
    assert FileTokenizer(folder).eos == 4
    assert load_tokenizer("bytes") == ByteTokenizer()


def test_a_pad_token_beyond_a_model_s_vocabulary_is_not_read(folder):
    named = {"eos_token": "</s>", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "tokenizer.json").write_text(json.dumps([*WORDS, "[PAD]"]))
    assert FileTokenizer(folder).special.pad == 10  # with sentinels: a decoder starts from it
    (folder / "tokenizer.json").write_text(json.dumps([*WORDS[:7], "[PAD]"]))
    tokenizer = FileTokenizer(folder)
    assert tokenizer.special == (1, 0, 6, ()) and tokenizer.decode([0, 7, 1]) == "the cat"


def test_an_id_of_0_is_text_and_padding_is_padding(folder):
    # Ids plus 1: the the | end, cat ... ; the second row is padded.
    tokenizer = FileTokenizer(folder)
    rows = pack_documents([np.array([0, 0], np.int32), np.array([1], np.int32)], 4, tokenizer)
    assert rows.tolist() == [[1, 1, 7, 2], [7, 0, 0, 0]] and rows.dtype == np.uint16
    batch = make_batch(rows, np.zeros(2, np.uint8), tokenizer.special)
    assert batch.ids_BS.tolist() == [[0, 0, 6], [6, 0, 0]]
    assert batch.targets_BS.tolist() == [[0, 6, 1], [0, 0, 0]]
    assert batch.mask_BS.tolist() == [[True, True, True], [True, False, False]]
    assert batch.segments_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    # An id of 0 is predicted; what follows an end is not, and padding is not.
    assert batch.weight_BS.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_a_large_id_is_kept_in_four_bytes_however_few_there_are(folder):
    # Words 10 to 69,999 are missing: the largest id counts, and not the number of words.
    (folder / "tokenizer.json").write_text(json.dumps([*WORDS, *[None] * (70000 - len(WORDS)), "moon"]))
    tokenizer = FileTokenizer(folder)
    assert tokenizer.vocab_size == 70001
    rows = pack_documents([tokenizer.encode("moon")], 2, tokenizer)
    assert rows.tolist() == [[70001, 7]] and rows.dtype == np.uint32


def test_a_corpus_is_packed_once_and_a_tokenizer_has_rows_of_its_own(config, folder, monkeypatch):
    packed = load_packed(config)
    assert packed.train.special == packed.validation.special == FileTokenizer(folder).special
    assert packed.train.largest_id == 6
    tokens = np.concatenate([rows.tokens[rows.tokens > 0] for rows in (packed.train, packed.validation)])
    ends = np.split(tokens - 1, np.flatnonzero(tokens == 7) + 1)
    documents = [FileTokenizer(folder).decode(ids) for ids in ends[:-1]]
    assert documents == ["the cat sat on a mat", "the the the", "a cat"] * 9
    monkeypatch.setattr("switchmoe.data.packing.pack_documents", None)
    again = load_packed(config)
    np.testing.assert_array_equal(again.train.tokens, packed.train.tokens)
    assert again.train.special == packed.train.special
    # Other tokens or another end are other rows; those of bytes are others still.
    names = {packed.fingerprint, corpus_fingerprint(dataclasses.replace(config, end_token="mat"))}
    names.add(corpus_fingerprint(dataclasses.replace(config, tokenizer="bytes")))
    (folder / "tokenizer.json").write_text(json.dumps([*WORDS, "dog"]))
    names.add(corpus_fingerprint(config))
    assert len(names) == 4


def test_spans_of_it_have_its_sentinels(config):
    config = dataclasses.replace(config, objective="span_corruption", noise_density=0.3)
    packed = load_packed(config)
    batch = batches(packed.train, 2, seed=0, corruption=config.corruption)[0]
    spans = config.corruption.lengths(config.row_length).spans
    assert 1 <= spans <= 3
    for source, target, mask in zip(batch.source_BP, batch.targets_BS, batch.mask_BS, strict=True):
        target = target[mask]
        assert source[-1] == target[-1] == 6 and target[0] == 7
        assert [token for token in source if token > 6] == [token for token in target if token > 6]
    with pytest.raises(ValueError, match=r"has 5 spans, but the tokenizer .* has 3 sentinels to mark them"):
        load_packed(dataclasses.replace(config, sequence_length=40))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "There is no tokenizer at .*tokenizer.json; give",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            r"tokenizer.json can't be read as a tokenizer \(.*\); get it again",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").unlink(),
            "Nothing beside .* says which token ends a document; set data.end_token",
        ),
        (
            lambda folder: (
                (folder / "tokenizer_config.json").unlink(),
                (folder / "generation_config.json").write_text('{"eos_token_id": 100000}'),
            ),
            "says that token 100000 ends a document, but .* has ids 0 to 9; set data.end_token to one",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}'),
            "tokenizer.json has no token '<end>'; give data.end_token one that it has",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("no"),
            r"tokenizer_config.json is not JSON \(.*\); mend it",
        ),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_a_sentence_and_nothing_is_written(config, folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        load_packed(config)
    assert not config.cache_folder().exists()


def test_without_the_library_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"needs the package tokenizers; install it with: pip install '.\[hf\]'"
    ):
        load_packed(config)


def test_bytes_have_an_end_of_their_own():
    with pytest.raises(ValueError, match="end_token is '</s>', but the byte tokenizer ends documents"):
        DataConfig(end_token="</s>")
