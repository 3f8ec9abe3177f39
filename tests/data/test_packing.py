"""Packing text into rows: hand-worked rows and cuts, nothing lost and nothing in both parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.data import DataConfig, load_packed
from switchmoe.data.packing import pack_documents, split_documents


def test_rows_by_hand():
    # a = 97 + 3 = 100, b = 101, and so on; 1 ends a document, 0 fills the last row up.
    rows = pack_documents([b"abc", b"d", b"ef"], 4)
    np.testing.assert_array_equal(rows, [[100, 101, 102, 1], [103, 1, 104, 105], [1, 0, 0, 0]])
    np.testing.assert_array_equal(pack_documents([b"abc"], 4), [[100, 101, 102, 1]])  # full: no padding
    assert rows.dtype == np.uint16


@pytest.mark.parametrize(
    ("documents", "fraction", "train", "validation"),
    [
        # Ten documents of 9 bytes are 100 tokens. A fifth of them are the last 20, two documents.
        ([b"nine byte"] * 10, 0.2, [b"nine byte"] * 8, [b"nine byte"] * 2),
        # 5 tokens would not fill a row of 9, so 9 are wanted; the nearest boundary leaves 10.
        ([b"nine byte"] * 10, 0.05, [b"nine byte"] * 9, [b"nine byte"]),
        # 95 would leave no row to train on.
        ([b"nine byte"] * 10, 0.95, [b"nine byte"], [b"nine byte"] * 9),
        # One document is cut: 100 tokens, 20 of them held out (19 letters and an end).
        ([b"a" * 80 + b"b" * 19], 0.2, [b"a" * 80], [b"b" * 19]),
        # 50 é of two bytes: 101 tokens, 20 held out, so at byte 81, inside an é; the cut moves back to 80.
        (["é".encode() * 50], 0.2, ["é".encode() * 40], ["é".encode() * 10]),
        # Wanted 50 and 50. The only boundary, at 91, would take 41 of the 50 away, more than half.
        ([b"a" * 50 + b"b" * 40, b"eight by"], 0.5, [b"a" * 50], [b"b" * 40, b"eight by"]),
        # At 71 it takes 21 of 50 away, and is kept.
        ([b"a" * 70, b"b" * 28], 0.5, [b"a" * 70], [b"b" * 28]),
    ],
)
def test_cuts_by_hand(documents, fraction, train, validation):
    assert split_documents(documents, 9, fraction, "a domain") == (train, validation)


documents = st.lists(st.text(min_size=1, max_size=40).map(str.encode), min_size=1, max_size=12)


@given(documents, st.integers(9, 12), st.floats(0.01, 0.99))
def test_the_parts_join_to_the_whole_and_each_has_a_row(documents, row_length, fraction):
    tokens = sum(len(document) + 1 for document in documents)
    if tokens < 2 * row_length:
        with pytest.raises(ValueError, match=f"here has {tokens} tokens, too few for a row of {row_length}"):
            split_documents(documents, row_length, fraction, "here")
        return
    train, validation = split_documents(documents, row_length, fraction, "here")
    assert train and validation and all(train) and all(validation)
    joined = b"".join(train) + b"".join(validation)
    assert joined == b"".join(documents)
    assert len(train) + len(validation) <= len(documents) + 1  # at most one document is cut
    for document in train + validation:
        document.decode()  # and that between two characters


def read_back(rows, domain):
    """Give the bytes of a domain's rows, the ends of documents left out."""
    tokens = np.asarray(rows.tokens)[np.asarray(rows.domain) == domain].reshape(-1)
    return (tokens[tokens >= 3] - 3).astype(np.uint8).tobytes()


def test_nothing_of_a_corpus_is_lost_or_in_both_parts(tmp_path):
    """The training rows of a domain, then its held-out rows, spell its file once."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = {name: [f"{name} {number} " * (number % 7 + 1) for number in range(40)] for name in ("b", "a")}
    for name, pieces in texts.items():
        (corpus / f"{name}.txt").write_text("\f".join(pieces))
    packed = load_packed(DataConfig(str(corpus), 16, 0.1, cache_dir=str(tmp_path / "cache")))
    assert packed.domains == ("a", "b")
    for number, name in enumerate(packed.domains):
        train, held_out = read_back(packed.train, number), read_back(packed.validation, number)
        assert (train + held_out).decode() == "".join(texts[name])
        assert 0.05 < len(held_out) / len(train + held_out) < 0.15
    for rows in (packed.train, packed.validation):
        assert isinstance(rows.tokens, np.memmap) and isinstance(rows.domain, np.memmap)
        assert rows.tokens.shape == (len(rows.domain), 17)
        assert rows.tokens.dtype == np.uint16 and rows.domain.dtype == np.uint8
        assert set(np.unique(rows.domain)) == {0, 1}
        with pytest.raises(ValueError, match="read-only"):
            rows.tokens[0, 0] = 5
