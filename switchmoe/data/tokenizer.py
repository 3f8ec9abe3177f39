"""A tokenizer without a vocabulary file: one token for each byte of UTF-8."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int32, UInt16


@dataclass(frozen=True)
class ByteTokenizer:
    """Turns a byte b of UTF-8 text into the token b + 3; the tokens 0, 1 and 2 are pad, end and unknown.

    The ids are those of ByT5 (Xue et al. 2021, https://arxiv.org/abs/2105.13626) without its sentinels.
    """

    pad: ClassVar[int] = 0
    eos: ClassVar[int] = 1
    unk: ClassVar[int] = 2
    offset: ClassVar[int] = 3
    vocab_size: ClassVar[int] = 259

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Give the text's tokens, one a byte, without an end token."""
        return self.encode_bytes(text.encode("utf-8")).astype(np.int32)

    def encode_bytes(self, data: bytes) -> UInt16[np.ndarray, " N"]:
        """Give the tokens of bytes that are known to be UTF-8, in the dtype that rows are stored in."""
        return np.frombuffer(data, np.uint8).astype(np.uint16) + np.uint16(self.offset)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Give the text of the tokens; pad, end and unknown say nothing, broken UTF-8 shows as U+FFFD.

        Raises ValueError for an id outside [0, 259).
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
        if tokens.size and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise ValueError(
                f"Token {wrong} is outside the byte vocabulary; give ids from 0 to {self.vocab_size - 1}."
            )
        data = (tokens[tokens >= self.offset] - self.offset).astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")
