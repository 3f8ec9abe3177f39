"""Weights kept as whole numbers of 8 or 4 bits times scales, and how a token is multiplied by them."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.typing import DTypeLike

from switchmoe.shapes import Array, Float, Int, Num

# What the largest weight becomes. In 4 bits it is cut to 7, or rounded to -8, to have use of all 16 numbers.
LARGEST = {8: 127.0, 4: 7.5}
# Rows that share a scale in 4 bits, where they divide the rows: one large weight spoils fewer others.
BLOCK = 128
# More blocks than this are not worth a product of whole numbers each.
MOST_BLOCKS = 16
# A sum of more products of two 8-bit numbers could leave 32 bits.
MOST_ROWS = 2**17
# Halves of a number of 16 bits: the upper one in steps of the scale, the lower one in steps of 1/254 of it.
_STEPS = 254


def quantize_weight(
    w_EIO: Float[Array, "*E I O"], bits: int = 8
) -> tuple[Num[Array, "*E rows O"], Float[Array, "*E Q O"]]:
    """Round a matrix to whole numbers times scales: (values, scales).

    In 8 bits a column has one scale (Q = 1), its largest weight over 127, and values are int8. In 4 bits Q
    blocks of `BLOCK` rows have a scale each, their largest weight over 7.5, and two values share a byte
    (uint8, I / 2 rows): rows 2i and 2i + 1, the first in the lower half, each plus 8. Scales are float32.

    Raises:
      ValueError: one sentence, if the bits are not 8 or 4, or the matrix has too many rows or an odd number.
    """
    rows = w_EIO.shape[-2]
    if bits not in LARGEST:
        raise ValueError(f"bits is {bits}, but weights are rounded to 8 or 4 bits; choose one of the two.")
    if rows > MOST_ROWS or (bits == 4 and rows % 2):
        raise ValueError(
            f"A matrix of {rows} rows can't be kept in {bits} bits: it may have {MOST_ROWS} at most, and in "
            "4 bits an even number; leave this model as it is."
        )
    blocks = rows // BLOCK if bits == 4 and rows % BLOCK == 0 else 1
    w_EQPO = rearrange(jnp.asarray(w_EIO, jnp.float32), "... (Q P) O -> ... Q P O", Q=blocks)
    scale_EQO = jnp.max(jnp.abs(w_EQPO), axis=-2) / LARGEST[bits]
    # A block of zeros has scale 0, and its values are 0.
    step_EQ1O = jnp.where(scale_EQO > 0, scale_EQO, 1.0)[..., None, :]
    values_EIO = rearrange(jnp.round(w_EQPO / step_EQ1O), "... Q P O -> ... (Q P) O")
    values_EIO = jnp.clip(values_EIO, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(jnp.int8)
    return (values_EIO if bits == 8 else _pack(values_EIO)), scale_EQO


def dequantize_weight(
    values: Num[Array, "*E rows O"], scale_EQO: Float[Array, "*E Q O"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*E I O"]:
    """Multiply the whole numbers by their scales."""
    values_EIO = unpack(values)
    block = values_EIO.shape[-2] // scale_EQO.shape[-2]
    return (values_EIO * repeat(scale_EQO, "... Q O -> ... (Q block) O", block=block)).astype(dtype)


def packed_in(values: Num[Array, "..."]) -> int:
    """Say how many rows of numbers are in one of the array."""
    return 2 if values.dtype == jnp.uint8 else 1


def unpack(values: Num[Array, "*E rows O"], dtype: DTypeLike = jnp.int8) -> Num[Array, "*E I O"]:
    """Give the numbers one by one, in another type if wanted; what is not packed is so already."""
    if packed_in(values) == 1:
        return values.astype(dtype)
    pairs = jnp.stack([values & 15, values >> 4], axis=-2).astype(jnp.int8) - 8
    return rearrange(pairs, "... I two O -> ... (I two) O").astype(dtype)


def _pack(values_EIO: Int[Array, "*E I O"]) -> Num[Array, "*E half O"]:
    first, second = (values_EIO[..., start::2, :] + 8 for start in (0, 1))
    return first.astype(jnp.uint8) | (second.astype(jnp.uint8) << 4)


def multiply(
    x_RI: Float[Array, "R I"],
    w_IO: Num[Array, "rows O"],
    scale_QO: Float[Array, "Q O"] | None = None,
) -> Float[Array, "R O"]:
    """Multiply rows by a matrix, in their type; with scales, by whole numbers times these.

    Only the weights are rounded. On a CPU the product is one of whole numbers, which reads a quarter of the
    bytes and is several times as fast: a row is written as two of 8 bits, together 16 bits of its largest
    entry's range, which is more than bfloat16 has and 1/65,000 off at most. Elsewhere the values are
    converted where they are used.
    """
    if scale_QO is None:
        return x_RI @ w_IO.astype(x_RI.dtype)
    return lax.platform_dependent(
        x_RI, w_IO, scale_QO, cpu=multiply_by_integers, default=_multiply_by_converted
    )


def _multiply_by_converted(x_RI, values, scale_QO):
    if scale_QO.shape[0] > 1:
        return x_RI @ dequantize_weight(values, scale_QO, x_RI.dtype)
    y_RO = jnp.matmul(x_RI, unpack(values).astype(x_RI.dtype), preferred_element_type=jnp.float32)
    return (y_RO * scale_QO).astype(x_RI.dtype)


def multiply_by_integers(x_RI, values, scale_QO):
    """Multiply rows, each written as two rows of 8-bit numbers, by whole numbers, and scale the result."""
    if scale_QO.shape[0] > MOST_BLOCKS:
        return _multiply_by_converted(x_RI, values, scale_QO)
    return multiply_halves(split_in_halves(x_RI), values, scale_QO).astype(x_RI.dtype)


class Halves(NamedTuple):
    """Rows in 16 bits: scale * (upper + lower / 254).

    Attributes:
      scale_R1: a row's largest entry over 127.
      halves_NI: two rows of 8-bit numbers each, all upper ones first.
    """

    scale_R1: Float[Array, "R 1"]
    halves_NI: Int[Array, "N I"]


def split_in_halves(x_RI: Float[Array, "R I"]) -> Halves:
    """Write each row as a scale times two rows of 8-bit numbers, off by 1/65,000 of its peak at most."""
    x_RI = x_RI.astype(jnp.float32)
    scale_R1 = jnp.max(jnp.abs(x_RI), axis=1, keepdims=True) / LARGEST[8]
    steps_RI = x_RI / jnp.where(scale_R1 > 0, scale_R1, 1.0)
    upper_RI = jnp.round(steps_RI)
    lower_RI = jnp.round((steps_RI - upper_RI) * _STEPS)
    return Halves(scale_R1, jnp.concatenate([upper_RI, lower_RI]).astype(jnp.int8))


def multiply_halves(
    x: Halves, values: Num[Array, "rows O"], scale_QO: Float[Array, "Q O"]
) -> Float[Array, "R O"]:
    """Multiply rows by whole numbers, in float32."""
    blocks = scale_QO.shape[0]
    y_NO: Array | float = 0.0
    # A product a block: XLA:CPU has a fast one for two matrices of 8 bits, and none for stacks of them.
    parts = zip(jnp.split(x.halves_NI, blocks, axis=1), jnp.split(unpack(values), blocks), strict=True)
    for block, (halves_NP, values_PO) in enumerate(parts):
        y_NO = y_NO + scale_QO[block] * jnp.matmul(halves_NP, values_PO, preferred_element_type=jnp.int32)
    upper_RO, lower_RO = jnp.split(y_NO, 2)
    return (upper_RO + lower_RO / _STEPS) * x.scale_R1
