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


def test_sentinels_count_down_from_the_end_of_the_vocabulary():
    assert tokenizer.special == (0, 0, 1, tuple(range(383, 258, -1)))
    assert len(tokenizer.special.sentinels) == tokenizer.num_sentinels == 125
    # An é of two bytes, whole and cut in two.
    assert tokenizer.decode([75, 383, 198, 172, 1, 259]) == "H<extra_id_0>é<extra_id_124>"
    assert tokenizer.decode([198, 382, 172]) == "\ufffd<extra_id_1>\ufffd"


@pytest.mark.parametrize("wrong", [-1, 384])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(
        ValueError, match=f"Token {wrong} is outside the byte vocabulary and its sentinels; give ids from 0"
    ):
        tokenizer.decode([75, wrong])
