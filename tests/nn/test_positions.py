"""Buckets of distances by hand, and what the table of biases says of two tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.nn import RelativePositions, bucket_distances


def test_buckets_of_a_decoder_by_hand():
    # 8 buckets, 4 of them a distance each (0 to 3); the wide ones start at 4 * (32 / 4) ** (i / 4), i = 0
    # to 3: 4, 6.7, 11.3, 19.03, so from 4, 7, 12 and 20 on. What lies ahead counts as distance 0.
    behind = np.array([0, 1, 2, 3, 4, 6, 7, 11, 12, 19, 20, 31, 32, 1000])
    want = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7]
    assert bucket_distances(-jnp.array(behind), 8, 32, bidirectional=False).tolist() == want
    assert bucket_distances(jnp.array([1, 50]), 8, 32, bidirectional=False).tolist() == [0, 0]


def test_buckets_of_an_encoder_by_hand():
    # Four buckets a side: distances 0 and 1 have their own, the wide ones start at 2 and 2 * 16 ** (1/2) = 8.
    # The second half, 4 to 7, is for tokens ahead; distance 0 is not ahead.
    ahead = jnp.array([0, -1, -2, -7, -8, -500, 1, 2, 7, 8, 500])
    assert bucket_distances(ahead, 8, 32, bidirectional=True).tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_of_t5_follow_the_logarithm(bidirectional):
    # T5's sizes, 32 buckets up to 128; at 16, 32 and 64 the logarithm is a whole number, so exact arithmetic
    # decides: the bucket of distance d is the largest j with near * (128 / near) ** ((j - near) / near) <= d.
    half = 16 if bidirectional else 32
    near = half // 2
    for distance in range(0, 300):
        want = distance
        if distance >= near:
            fits = [
                j for j in range(near, half) if near**near * (128 // near) ** (j - near) <= distance**near
            ]
            want = max(fits)
        got = bucket_distances(jnp.array(-distance), 32, 128, bidirectional=bidirectional)
        assert int(got) == want, distance


def test_each_head_adds_its_own_bias():
    positions = RelativePositions(2, buckets=4, furthest=8, bidirectional=False, rngs=nnx.Rngs(0))
    positions.bias_UH[...] = jnp.arange(8.0).reshape(4, 2)
    bias = positions(jnp.array([2, 3]), jnp.array([0, 1, 2, 3]))
    # From place 2: distances 2, 1, 0 and one ahead: buckets 2, 1, 0, 0. From place 3: 3 and 2 are both in
    # bucket 2 (2 and 3 are below 2 * 4 ** (1/2) = 4).
    assert bias[0, 0].tolist() == [[4, 2, 0, 0], [4, 4, 2, 0]]
    assert bias[0, 1].tolist() == [[5, 3, 1, 1], [5, 5, 3, 1]]
