"""What generation gives back: new tokens, where each row ends, and why."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from switchmoe.infer.config import GenerateConfig
from switchmoe.infer.prompts import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was added to each prompt.

    Attributes:
      tokens_BN: the new tokens, the pad token behind a row's end; as many columns as the longest row has.
      lengths_B: how many of them are the row's; a stop token counts.
      why: "stop" for a row that chose a stop token, "length" for one that came to max_new_tokens.
      log_probs_BN: how probable the model found each, 0 behind the end; None unless asked for.
      texts: the rows as texts, without their stop tokens; None without a tokenizer.
    """

    tokens_BN: Int32[np.ndarray, "B N"]
    lengths_B: Int32[np.ndarray, " B"]
    why: tuple[str, ...]
    log_probs_BN: Float32[np.ndarray, "B N"] | None = None
    texts: tuple[str, ...] | None = None

    def rows(self) -> list[Int32[np.ndarray, " _"]]:
        """Give each row's tokens without what is behind its end."""
        return [row[:length] for row, length in zip(self.tokens_BN, self.lengths_B, strict=True)]


class NewTokens(NamedTuple):
    """One more token of every row that has not ended.

    Attributes:
      tokens_B: the pad token in rows that had ended before.
      live_B: which rows had not.
      ended_B: which rows have ended now.
      log_probs_B: how probable the model found the tokens; None unless asked for.
    """

    tokens_B: Int32[np.ndarray, " B"]
    live_B: Bool[np.ndarray, " B"]
    ended_B: Bool[np.ndarray, " B"]
    log_probs_B: Float32[np.ndarray, " B"] | None = None


def collect(
    ids_BN: Int32[np.ndarray, "B N"],
    log_probs_BN: Float32[np.ndarray, "B N"],
    config: GenerateConfig,
    tokenizer: Tokenizer | None = None,
) -> Generated:
    """Say where each row ends, and why."""
    stops_BN = np.isin(ids_BN, config.stop_tokens)
    stopped_B = np.any(stops_BN, axis=1)
    lengths_B = np.where(stopped_B, stops_BN.argmax(axis=1) + 1, ids_BN.shape[1]).astype(np.int32)
    texts = None
    if tokenizer is not None:
        ends_B = lengths_B - stopped_B
        texts = tuple(tokenizer.decode(row[:end].tolist()) for row, end in zip(ids_BN, ends_B, strict=True))
    why = tuple("stop" if stopped else "length" for stopped in stopped_B.tolist())
    return Generated(ids_BN, lengths_B, why, log_probs_BN if config.log_probs else None, texts)
