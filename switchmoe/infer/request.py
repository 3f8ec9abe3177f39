"""A request to generate: prompts and settings, checked, in the form that compiled programs take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from switchmoe.infer.config import GenerateConfig
from switchmoe.infer.prompts import Prompts, Tokenizer, bucket_length, encode_prompts, pad
from switchmoe.infer.sampling import row_keys
from switchmoe.models import LMConfig
from switchmoe.parallel import Layout
from switchmoe.shapes import Array, Bool, Float, Int, Key, ScalarKey


class Shape(NamedTuple):
    """What a program is compiled for, beside the shapes of its arguments.

    Attributes:
      room: places in the cache for new tokens.
      draw: whether tokens are drawn, and not the best ones taken.
      top_k: see `GenerateConfig`.
      use_top_p: whether there is a top_p.
      log_probs: whether the tokens' log probabilities are wanted.
    """

    room: int
    draw: bool
    top_k: int | None
    use_top_p: bool
    log_probs: bool


class Request(NamedTuple):
    """What to generate from: rows of prompts, and numbers that another value of needs no other program.

    Attributes:
      ids_BS, mask_BS: the prompts, padded in front.
      source_BP, source_mask_BP: what the encoder reads; None without one.
      ended_B: True for rows that only fill the batch up.
      keys_B: each row's own.
      limit: new tokens at most.
      temperature, top_p: see `GenerateConfig`.
      stop_N, banned_N: tokens, and some that do not exist.
      pad: what an ended row is given.
    """

    ids_BS: Int[Array, "B S"]
    mask_BS: Bool[Array, "B S"]
    source_BP: Int[Array, "B P"] | None
    source_mask_BP: Bool[Array, "B P"] | None
    ended_B: Bool[Array, " B"]
    keys_B: Key[Array, " B"]
    limit: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop_N: Int[Array, " N"]
    banned_N: Int[Array, " N"]
    pad: Int[Array, ""]


def make_request(
    model: LMConfig,
    config: GenerateConfig,
    prompts: Prompts,
    *,
    tokenizer: Tokenizer | None = None,
    key: ScalarKey | None = None,
    row_ids: Sequence[int] | None = None,
    decoder_prompts: Prompts | None = None,
    layout: Layout | None = None,
) -> tuple[Request, Shape, int]:
    """Check what was asked for, and give the request, what it needs programs for, and how many rows are real.

    For the arguments and errors see `switchmoe.infer.generate`.
    """
    config.check_vocabulary(model.vocab_size)
    if config.temperature > 0 and key is None:
        raise ValueError(
            f"temperature={config.temperature} draws tokens, which needs a key; pass key=jax.random.key(0), "
            "or set temperature=0."
        )
    rows, source = _read_rows(model, config, prompts, tokenizer, decoder_prompts)
    row_ids = range(len(rows)) if row_ids is None else row_ids
    if len(row_ids) != len(rows):
        raise ValueError(f"There are {len(rows)} prompts and {len(row_ids)} row_ids; give one for each.")
    if not all(0 <= int(row) < 2**31 for row in row_ids):
        raise ValueError("row_ids must be whole numbers from 0 to 2**31 - 1; number the rows so.")

    # On a mesh rows are split evenly, so some may only fill up.
    devices = 1 if layout is None else layout.size(layout.rules.rows)
    batch = -(-len(rows) // devices) * devices
    request = _fill_in(rows, source, batch, config, jax.random.key(0) if key is None else key, row_ids)
    if layout is not None:
        request = request._replace(keys_B=jax.device_put(request.keys_B, layout.sharding()))
    shape = Shape(
        room=bucket_length(config.max_new_tokens),
        draw=config.temperature > 0,
        top_k=config.top_k,
        use_top_p=config.top_p is not None,
        log_probs=config.log_probs,
    )
    return request, shape, len(rows)


def _read_rows(model: LMConfig, config: GenerateConfig, prompts, tokenizer, decoder_prompts):
    """Give the decoder's rows, and the encoder's or None."""
    rows = encode_prompts(prompts, model.vocab_size, tokenizer)
    if not model.encoder_layers:
        if decoder_prompts is not None:
            raise ValueError(
                "This model has no encoder, so its prompts are the decoder's; drop decoder_prompts."
            )
        return rows, None
    if decoder_prompts is None:
        return [np.array([config.start_token], np.int32)] * len(rows), rows
    begun = encode_prompts(decoder_prompts, model.vocab_size, tokenizer, what="decoder prompt")
    if len(begun) != len(rows):
        raise ValueError(
            f"There are {len(rows)} prompts and {len(begun)} decoder_prompts; give one for each."
        )
    return begun, rows


def _fill_in(rows, source, batch: int, config: GenerateConfig, key, row_ids) -> Request:
    ids_BS, mask_BS = pad(rows, batch, bucket_length(max(map(len, rows))))
    source_BP = source_mask_BP = None
    if source is not None:
        source_BP, source_mask_BP = pad(source, batch, bucket_length(max(map(len, source))), front=False)
    ids_B = np.zeros(batch, np.int32)
    ids_B[: len(rows)] = row_ids
    # On the host, so that jax puts them wherever the weights are.
    inputs: dict[str, Any] = dict(
        ids_BS=ids_BS,
        mask_BS=mask_BS,
        source_BP=source_BP,
        source_mask_BP=source_mask_BP,
        ended_B=np.arange(batch) >= len(rows),
        keys_B=row_keys(key, jnp.asarray(ids_B)),
        limit=np.int32(config.max_new_tokens),
        temperature=np.float32(config.temperature),
        top_p=np.float32(1.0 if config.top_p is None else config.top_p),
        stop_N=_lengthen(config.stop_tokens),
        banned_N=_lengthen(config.banned_tokens),
        pad=np.int32(config.pad_token),
    )
    return Request(**inputs)


def _lengthen(tokens: tuple[int, ...]) -> Int32[np.ndarray, " N"]:
    """Fill up with a token that does not exist, to 8 or a multiple of it, so that few programs serve all."""
    missing = max(8, -(-len(tokens) // 8) * 8) - len(tokens)
    return np.array([*tokens, *[np.iinfo(np.int32).max] * missing], np.int32)
