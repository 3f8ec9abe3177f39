"""The legend of dimensions, and the array types used in signatures.

An array's name carries its dimensions as a suffix: `x_GTD` has groups, tokens and model features.

    B  batch: rows of a batch              E  experts
    S  sequence: positions in a row        C  capacity: seats an expert has in one group
    G  groups of tokens routed together    K  choices: experts a token goes to
    T  tokens in a group                   V  vocabulary
    D  model features                      H  heads
    F  hidden features of an FFN           L  layers
    N  tokens or choices of all groups     R  seats of all experts and groups
    I  input features of a matrix          O  output features
    P  rows of a piece of them             1  a dimension of one
    J  rank of a low-rank adapter

Capitals name logical dimensions, never how an array is split over devices.
"""

import zlib

import jax
from jaxtyping import Array, Bool, Float, Int, Key, Num

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Num", "ScalarKey", "named_key"]

ScalarKey = Key[Array, ""]


def named_key(key: ScalarKey, name: str) -> ScalarKey:
    """Derive the key of the weight or noise called `name`, whatever else is drawn from `key`.

    A name, unlike a position in `jax.random.split`, does not shift when a weight is added.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
