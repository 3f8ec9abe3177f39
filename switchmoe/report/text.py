"""Token ids of the byte tokenizer as characters, each with the tokens that spell it."""

import unicodedata
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from switchmoe.data import ByteTokenizer
from switchmoe.report.records import PAD_ID, Snippet

EOS_ID, FIRST_BYTE_ID = ByteTokenizer.eos, ByteTokenizer.offset
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Character(NamedTuple):
    """What is shown for `tokens` tokens from position `start` on; one token unless UTF-8 needs more bytes."""

    shown: str
    start: int
    tokens: int


def decode(token_ids_S: Integer[np.ndarray, " S"]) -> list[Character]:
    """Turns tokens into characters; the bytes of one UTF-8 character stay together, padding is left out.

    A byte that belongs to no whole character (a row may begin or end inside one) is shown as U+FFFD.
    """
    ids = [int(token) for token in token_ids_S]
    characters, i = [], 0
    while i < len(ids):
        shown, tokens = _at(ids, i)
        if shown:
            characters.append(Character(shown, i, tokens))
        i += tokens
    return characters


def _at(ids: list[int], i: int) -> tuple[str, int]:
    """The character that begins at position i, and how many tokens it takes."""
    if ids[i] == PAD_ID:
        return "", 1
    if ids[i] == EOS_ID:
        return "\N{END OF PROOF}\n", 1
    lead = ids[i] - FIRST_BYTE_ID
    # The number of leading one bits of the first byte is the length of the character (RFC 3629, section 3).
    length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    values = [token - FIRST_BYTE_ID for token in ids[i : i + length]]
    try:
        return _visible(bytes(values).decode("utf-8")), length
    except ValueError:  # Not UTF-8, or not a byte at all: UnicodeDecodeError is a ValueError.
        return REPLACEMENT, 1


def _visible(character: str) -> str:
    """Marks line ends and tabs, and replaces what has no glyph or would reorder the text around it."""
    code = ord(character)
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
    if character == "\t":
        return "\N{RIGHTWARDS ARROW TO BAR}\t"
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of the control codes.
    return REPLACEMENT if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn") else character


def choices(snippet: Snippet, layer: int, character: Character) -> str:
    """Says in words where the character's first token went: the experts, their weights, what was dropped."""
    at = character.start
    parts = [
        f"expert {expert}, weight {weight:.2f}{'' if kept else ' (dropped)'}"
        for expert, weight, kept in zip(
            snippet.expert_LSK[layer, at],
            snippet.weight_LSK[layer, at],
            snippet.kept_LSK[layer, at],
            strict=True,
        )
        if expert >= 0
    ] or ["no expert"]
    more = f"; first of {character.tokens} bytes" if character.tokens > 1 else ""
    return "; ".join(parts) + more


def css_class(snippet: Snippet, layer: int, character: Character) -> str:
    """`eN` colours by the first choice N of the first token; `x`: none of its choices found a seat.

    A token that no expert chose has no colour, and only the `x`.
    """
    at = character.start
    first = int(snippet.expert_LSK[layer, at, 0])
    if first < 0:
        return "x"
    return f"e{first}" if snippet.kept_LSK[layer, at].any() else f"e{first} x"


def coloured(snippet: Snippet, layer: int) -> list[dict[str, str]]:
    """One entry a character for the template: what to show, its classes and its title."""
    return [
        {"shown": c.shown, "css": css_class(snippet, layer, c), "title": choices(snippet, layer, c)}
        for c in decode(snippet.token_ids_S)
    ]


def for_script(snippet: Snippet) -> dict[str, object]:
    """What the page's script needs to recolour a snippet for another layer, as small as plain JSON allows."""
    characters = decode(snippet.token_ids_S)
    at = [c.start for c in characters]
    return {
        "bytes": [c.tokens for c in characters],
        "expert": snippet.expert_LSK[:, at].tolist(),
        "percent": np.rint(snippet.weight_LSK[:, at] * 100).astype(int).tolist(),
        "kept": snippet.kept_LSK[:, at].astype(int).tolist(),
    }
