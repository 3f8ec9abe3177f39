"""A batch of rows as the model takes it: inputs, targets, and what may see and count what."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer

from switchmoe.data.tokenizer import ByteTokenizer


class Batch(NamedTuple):
    """Rows of tokens with their targets, as numpy arrays.

    ids_BS and targets_BS are a row without its last and without its first token. segments_BS numbers the
    documents of a row from 1 (0 at padding), positions_BS counts from 0 in each of them. weight_BS is 1.0
    where the target counts in the loss: not at padding, nor where it is the first token of a next document.
    mask_BS is False at padding. domain_B says which of the corpus' domains a row is from.
    """

    ids_BS: Int32[np.ndarray, "B S"]
    targets_BS: Int32[np.ndarray, "B S"]
    segments_BS: Int32[np.ndarray, "B S"]
    positions_BS: Int32[np.ndarray, "B S"]
    weight_BS: Float32[np.ndarray, "B S"]
    mask_BS: Bool[np.ndarray, "B S"]
    domain_B: Int32[np.ndarray, " B"]


def make_batch(tokens_BR: Integer[np.ndarray, "B R"], domain_B: Integer[np.ndarray, " B"]) -> Batch:
    """Shift packed rows into inputs and targets, and find documents and padding from the end and pad tokens.

    tokens_BR holds rows of R = S + 1 tokens, padded with 0 at their ends; domain_B their domains. An end
    token belongs to the document that it ends.
    """
    ids_BS = tokens_BR[:, :-1].astype(np.int32)
    targets_BS = tokens_BR[:, 1:].astype(np.int32)
    mask_BS = ids_BS != ByteTokenizer.pad
    end_BS = ids_BS == ByteTokenizer.eos
    start_BS = np.zeros_like(mask_BS)
    start_BS[:, 1:] = end_BS[:, :-1]
    segments_BS = np.where(mask_BS, 1 + np.cumsum(start_BS, axis=1, dtype=np.int32), 0)
    steps_S = np.arange(ids_BS.shape[1], dtype=np.int32)
    latest_start_BS = np.maximum.accumulate(np.where(start_BS, steps_S, 0), axis=1)
    positions_BS = np.where(mask_BS, steps_S - latest_start_BS, 0)
    counts_BS = (targets_BS != ByteTokenizer.pad) & ~end_BS
    return Batch(
        ids_BS=ids_BS,
        targets_BS=targets_BS,
        segments_BS=segments_BS.astype(np.int32),
        positions_BS=positions_BS.astype(np.int32),
        weight_BS=counts_BS.astype(np.float32),
        mask_BS=mask_BS,
        domain_B=domain_B.astype(np.int32),
    )
