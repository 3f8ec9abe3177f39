"""A tokenizer without a vocabulary file: one token for each byte of UTF-8."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt16


class SpecialTokens(NamedTuple):
    """The tokens of a tokenizer that are no text, and how its tokens are kept in rows.

    Attributes:
      shift: added to an id in a row, where 0 is padding: 0 where no text has the id 0.
      pad: the id that the model reads at padding, and that a decoder behind an encoder starts from.
      eos: the id that ends a document.
      sentinels: the ids that stand for spans that were cut out, in their order; empty where there are none.
    """

    shift: int
    pad: int
    eos: int
    sentinels: tuple[int, ...]


@dataclass(frozen=True)
class ByteTokenizer:
    """Turns a byte b of UTF-8 text into the token b + 3; the tokens 0, 1 and 2 are pad, end and unknown.

    The ids are those of ByT5 (Xue et al. 2021, https://arxiv.org/abs/2105.13626) without its sentinels. Those
    that span corruption needs are 125 more ids behind them, counted down from the last as T5's are: sentinel
    0 is 383, sentinel 124 is 259. So a model that meets them has a vocabulary of 384, three tiles of 128.
    """

    pad: ClassVar[int] = 0
    eos: ClassVar[int] = 1
    unk: ClassVar[int] = 2
    offset: ClassVar[int] = 3
    vocab_size: ClassVar[int] = 259
    num_sentinels: ClassVar[int] = 125
    vocab_size_with_sentinels: ClassVar[int] = 384

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Give the text's tokens, one a byte, without an end token."""
        return self.encode_bytes(text.encode("utf-8")).astype(np.int32)

    def encode_bytes(self, data: bytes) -> UInt16[np.ndarray, " N"]:
        """Give the tokens of bytes that are known to be UTF-8, in the dtype that rows are stored in."""
        return np.frombuffer(data, np.uint8).astype(np.uint16) + np.uint16(self.offset)

    @property
    def special(self) -> SpecialTokens:
        """The tokens that are no bytes."""
        return BYTES

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Give the text of the tokens; pad, end and unknown say nothing, broken UTF-8 shows as U+FFFD.

        Sentinel 0 is written <extra_id_0>, and so on, as T5's tokenizers do; a character does not go on
        across it.

        Raises ValueError for an id outside [0, 384).
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
        largest = self.vocab_size_with_sentinels - 1
        if tokens.size and not (0 <= tokens.min() and tokens.max() <= largest):
            wrong = tokens[(tokens < 0) | (tokens > largest)][0]
            raise ValueError(
                f"Token {wrong} is outside the byte vocabulary and its sentinels; give ids from 0 to "
                f"{largest}."
            )
        places = np.flatnonzero(tokens >= self.vocab_size)
        pieces = [self._decode_bytes(piece) for piece in np.split(tokens, places)]
        names = [f"<extra_id_{largest - token}>" for token in tokens[places]]
        return pieces[0] + "".join(name + piece for name, piece in zip(names, pieces[1:], strict=True))

    def _decode_bytes(self, tokens_N: Int64[np.ndarray, " N"]) -> str:
        """Give the text of the bytes among some tokens."""
        is_byte_N = (tokens_N >= self.offset) & (tokens_N < self.vocab_size)
        data = (tokens_N[is_byte_N] - self.offset).astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")


_TOP = ByteTokenizer.vocab_size_with_sentinels
BYTES = SpecialTokens(
    shift=0,
    pad=ByteTokenizer.pad,
    eos=ByteTokenizer.eos,
    sentinels=tuple(range(_TOP - 1, _TOP - 1 - ByteTokenizer.num_sentinels, -1)),
)
