"""A check on token ids that has to happen before they reach the device."""

import numpy as np


def check_tokens(ids: np.ndarray, vocab_size: int) -> None:
    """Look at token ids on the host, since compiled code cannot complain about one outside the vocabulary.

    Args:
      ids: token ids, integers of any shape.
      vocab_size: they must lie in [0, vocab_size).

    Raises:
      ValueError: one sentence, if ids are no integers, or one lies outside.
    """
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"Token ids have type {ids.dtype}, but must be integers; tokenize the text first.")
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"Token id {wrong} lies outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1}); use "
            f"the tokenizer the model was configured for, or raise vocab_size."
        )
