"""The byte tokenizer: ids known from ByT5, and what goes in comes out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.data import ByteTokenizer

tokenizer = ByteTokenizer()


def test_ids_by_hand():
    # "Hi" is the bytes 72 and 105; "é" is 0xC3 0xA9 = 195, 169; each plus 3.
    np.testing.assert_array_equal(tokenizer.encode("Hié"), [75, 108, 198, 172])
    assert tokenizer.encode("Hi").dtype == np.int32
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unk, tokenizer.vocab_size) == (0, 1, 2, 259)


def test_special_tokens_say_nothing_and_broken_text_shows():
    assert tokenizer.decode([75, 1, 0, 2, 108]) == "Hi"
    assert tokenizer.decode([198, 75]) == "\ufffdH"  # the first half of an é
    assert tokenizer.decode([]) == ""


@given(st.text())
def test_round_trip(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("wrong", [-1, 259])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(
        ValueError, match=f"Token {wrong} is outside the byte vocabulary; give ids from 0 to 258"
    ):
        tokenizer.decode([75, wrong])
