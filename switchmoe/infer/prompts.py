"""Prompts as they come, texts or token ids of any lengths, to one block of left-padded rows and back."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from switchmoe.models import check_tokens

# A text or several, or a row of token ids or several, as lists or arrays.
Prompts = str | Sequence[Any] | np.ndarray
# Texts that break off inside a character end with this, until its other bytes come.
_BROKEN = "\ufffd"


@runtime_checkable
class Tokenizer(Protocol):
    """What turns a text into token ids and back."""

    def encode(self, text: str, /) -> Any:
        """Give the ids of a text, as a sequence or an array."""
        ...

    def decode(self, ids: Any, /) -> str:
        """Give the text of ids."""
        ...


def bucket_length(length: int) -> int:
    """Round a length up, so that few programs serve all lengths: at most a quarter (or up to 16) is padding.

    The results are the multiples of 16 up to 128, of 32 up to 256, of 64 up to 512, and so on.
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def encode_prompts(
    prompts: Prompts, vocab_size: int, tokenizer: Tokenizer | None = None, *, what: str = "prompt"
) -> list[Int32[np.ndarray, " _"]]:
    """Turn prompts into token ids, a row each; a single text, or one row of ids, is one prompt.

    Raises:
      ValueError: one sentence, if there is none, one is empty, there is no tokenizer for a text, or an id is
        outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    elif len(prompts) and np.ndim(prompts[0]) == 0 and not isinstance(prompts[0], str):
        prompts = [np.asarray(prompts)]
    if not len(prompts):
        raise ValueError(f"There is no {what}; give at least one.")
    rows = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    f"{what.capitalize()} {index} is a text, but there is no tokenizer; pass tokenizer=, or "
                    f"token ids in the place of texts."
                )
            prompt = tokenizer.encode(prompt)
        ids_S = np.asarray(prompt)
        if ids_S.ndim != 1 or not ids_S.size:
            raise ValueError(
                f"{what.capitalize()} {index} is empty, or no single row; give each at least one token."
            )
        check_tokens(ids_S, vocab_size)
        rows.append(ids_S.astype(np.int32))
    return rows


def pad(
    rows: list[Int32[np.ndarray, " _"]], num_rows: int, length: int, *, front: bool = True
) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Put the rows into one block, padded in `front` or behind, and say where they are: (ids_BS, mask_BS).

    Rows beyond those given are padding altogether.
    """
    ids_BS = np.zeros((num_rows, length), np.int32)
    mask_BS = np.zeros((num_rows, length), bool)
    for index, row in enumerate(rows):
        at = slice(length - len(row), length) if front else slice(0, len(row))
        ids_BS[index, at], mask_BS[index, at] = row, True
    return ids_BS, mask_BS


class TextStream:
    """Turns tokens into text as they come; a character that is not complete yet waits for its other bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = ""

    def add(self, token: int | np.integer) -> str:
        """Give the text that this token adds, "" where it only begins a character."""
        self._ids.append(int(token))
        return self._more(self._tokenizer.decode(self._ids).rstrip(_BROKEN))

    def end(self) -> str:
        """Give what still waits, a broken character as U+FFFD."""
        return self._more(self._tokenizer.decode(self._ids) if self._ids else "")

    def _more(self, text: str) -> str:
        more = text[len(self._said) :]
        self._said += more
        return more
