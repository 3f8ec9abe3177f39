"""A batch of rows as the model takes it: inputs, targets, and what may see and count what."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer

from switchmoe.data.tokenizer import BYTES, SpecialTokens


class Batch(NamedTuple):
    """Rows of tokens with their targets, as numpy arrays.

    ids_BS and targets_BS are a row without its last and without its first token. segments_BS numbers the
    documents of a row from 1 (0 at padding), positions_BS counts from 0 in each of them. weight_BS is 1.0
    where the target counts in the loss: not at padding, nor where it is the first token of a next document.
    mask_BS is False at padding. domain_B says which of the corpus' domains a row is from.

    Rows for an encoder and a decoder have a source too, the tokens that the encoder reads (padded with 0) and
    where they are no padding; ids_BS and targets_BS are then the decoder's (`make_span_batch`). For a decoder
    alone these two are None, which counts as nothing where a batch is taken as a tree of arrays.
    """

    ids_BS: Int32[np.ndarray, "B S"]
    targets_BS: Int32[np.ndarray, "B S"]
    segments_BS: Int32[np.ndarray, "B S"]
    positions_BS: Int32[np.ndarray, "B S"]
    weight_BS: Float32[np.ndarray, "B S"]
    mask_BS: Bool[np.ndarray, "B S"]
    domain_B: Int32[np.ndarray, " B"]
    source_BP: Int32[np.ndarray, "B P"] | None = None
    source_mask_BP: Bool[np.ndarray, "B P"] | None = None


def make_batch(
    tokens_BR: Integer[np.ndarray, "B R"],
    domain_B: Integer[np.ndarray, " B"],
    special: SpecialTokens = BYTES,
) -> Batch:
    """Shift packed rows into inputs and targets, and find documents and padding by end tokens and zeros.

    tokens_BR holds rows of R = S + 1 tokens, as ids plus `special.shift`, padded with 0 at their ends;
    domain_B their domains. An end token belongs to the document that it ends.
    """
    is_token_BR = tokens_BR != 0
    ids_BR = np.where(is_token_BR, tokens_BR.astype(np.int32) - special.shift, special.pad).astype(np.int32)
    ids_BS, targets_BS, mask_BS = ids_BR[:, :-1], ids_BR[:, 1:], is_token_BR[:, :-1]
    end_BS = mask_BS & (ids_BS == special.eos)
    start_BS = np.zeros_like(mask_BS)
    start_BS[:, 1:] = end_BS[:, :-1]
    segments_BS = np.where(mask_BS, 1 + np.cumsum(start_BS, axis=1, dtype=np.int32), 0)
    steps_S = np.arange(ids_BS.shape[1], dtype=np.int32)
    latest_start_BS = np.maximum.accumulate(np.where(start_BS, steps_S, 0), axis=1)
    positions_BS = np.where(mask_BS, steps_S - latest_start_BS, 0)
    counts_BS = is_token_BR[:, 1:] & ~end_BS
    return Batch(
        ids_BS=ids_BS,
        targets_BS=targets_BS,
        segments_BS=segments_BS.astype(np.int32),
        positions_BS=positions_BS.astype(np.int32),
        weight_BS=counts_BS.astype(np.float32),
        mask_BS=mask_BS,
        domain_B=domain_B.astype(np.int32),
    )
