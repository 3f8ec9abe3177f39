"""Tokens as coloured characters."""

import numpy as np

from switchmoe.data.tokenizer import ByteTokenizer
from switchmoe.report import Snippet, text
from tests.report.worlds import tokens, two_layers


def shown(ids):
    return [tuple(character) for character in text.decode(np.array(ids))]


def test_characters_of_several_bytes_stay_whole():
    # é is 2 bytes, 文 3, 🙂 4; the positions are those of the first bytes.
    assert shown(tokens("aé文🙂z")) == [("a", 0, 1), ("é", 1, 2), ("文", 3, 3), ("🙂", 6, 4), ("z", 10, 1)]


def test_decoding_agrees_with_the_tokenizer():
    sentence = "Échala en tierra. Y él la echó — 文字"
    ids = ByteTokenizer().encode(sentence)
    assert "".join(character.shown for character in text.decode(ids)) == sentence


def test_a_torn_character_is_one_replacement_a_byte():
    whole = tokens("é文")
    assert shown(whole[1:]) == [("�", 0, 1), ("文", 1, 3)]
    assert shown(whole[:-1]) == [("é", 0, 2), ("�", 2, 1), ("�", 3, 1)]
    # A first byte followed by something else than its continuation does not swallow it.
    assert shown([whole[0], *tokens("a")]) == [("�", 0, 1), ("a", 1, 1)]
    # A first byte at the edge of a document does not swallow the end of text.
    assert shown([whole[0], 1]) == [("�", 0, 1), ("∎\n", 1, 1)]


def test_what_has_no_glyph_is_made_visible():
    assert shown([0, *tokens("\n\t"), 1, 2, 0]) == [
        ("↵\n", 1, 1), ("⇥\t", 2, 1), ("∎\n", 3, 1), ("�", 4, 1),
    ]  # fmt: skip
    # A control character gets its picture; one that would reverse the text after it, a replacement.
    assert [c.shown for c in text.decode(np.array(tokens("\x07\u202e")))] == ["␇", "�"]


def test_colours_and_titles_by_hand():
    one = two_layers().snippets[0]
    assert text.coloured(one, 0) == [
        {"shown": "h", "css": "e0", "title": "expert 0, weight 0.10"},
        # Both bytes of é take the colour of the first, which went to expert 1 and found no seat.
        {"shown": "é", "css": "e1 x", "title": "expert 1, weight 0.20 (dropped); first of 2 bytes"},
        {"shown": "<", "css": "e1", "title": "expert 1, weight 0.20"},
    ]
    # In layer 1 only the second byte is dropped, so é is not marked.
    assert [entry["css"] for entry in text.coloured(one, 1)] == ["e1", "e0", "e0"]


def test_with_two_choices_only_losing_both_is_a_drop():
    snippet = Snippet(
        "a",
        np.array(tokens("xy")),
        np.array([[[2, 0], [1, 2]]]),
        np.array([[[0.75, 0.25], [0.5, 0.125]]], np.float32),
        np.array([[[False, True], [False, False]]]),
    )
    first, second = text.coloured(snippet, 0)
    assert first["css"] == "e2"
    assert first["title"] == "expert 2, weight 0.75 (dropped); expert 0, weight 0.25"
    assert second["css"] == "e1 x"


def test_the_script_gets_every_layer():
    assert text.for_script(two_layers().snippets[0]) == {
        "bytes": [1, 2, 1],
        "expert": [[[0], [1], [1]], [[1], [0], [0]]],
        "percent": [[[10], [20], [20]], [[20], [10], [10]]],
        "kept": [[[1], [0], [1]], [[1], [1], [1]]],
    }
