"""The dense parts of a Transformer against numpy and hand-worked numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.nn import MLP, Attention, RMSNorm, causal_mask, drop_features, rms_norm, rotate


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_rms_norm_by_hand():
    # (3, 4, 0, 0) has mean square 25 / 4, root 2.5; (3, 4, 0, 0) / 2.5 = (1.2, 1.6, 0, 0), then times scale.
    got = rms_norm(jnp.array([3.0, 4.0, 0.0, 0.0]), jnp.array([1.0, 10.0, 1.0, 1.0]), 0.0)
    np.testing.assert_allclose(got, [1.2, 16.0, 0.0, 0.0], rtol=1e-6)


def test_rms_norm_reduces_in_float32():
    # 4096 squares of 1 sum to 4096 exactly in float32; a bfloat16 sum gets stuck at 256 (8 bits of mantissa).
    x = jnp.ones((2, 4096), jnp.bfloat16) * 3
    got = RMSNorm(4096)(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), 1.0)
    x = draw((5, 7, 16))
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(RMSNorm(16)(jnp.asarray(x)), want, rtol=2e-6)


def test_rotate_by_hand():
    # Four features are two pairs, (0, 2) and (1, 3), of rates theta ** 0 = 1 and theta ** (-1/2) = 0.1 for
    # theta = 100. At position 2 the first pair (1, 0) turns by 2 rad into (cos 2, sin 2), and the other by
    # 0.2 rad, (0, 1) into (-sin 0.2, cos 0.2). At position 0 nothing turns.
    x = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 1.0]), (1, 2, 1, 4))
    got = rotate(x, jnp.array([[0, 2]]), 100.0)[0, :, 0]
    np.testing.assert_allclose(got[0], [1, 0, 0, 1], atol=1e-7)
    np.testing.assert_allclose(got[1], [-0.4161468, -0.1986693, 0.9092974, 0.9800666], atol=1e-6)


def test_rotated_products_depend_on_distance_only():
    q, k = jnp.asarray(draw((1, 1, 1, 8))), jnp.asarray(draw((1, 1, 1, 8), seed=1))

    def product(i, j):
        return float(jnp.vdot(rotate(q, jnp.array([[i]]), 1e4), rotate(k, jnp.array([[j]]), 1e4)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 5)) > 1e-2


def attend_in_numpy(x, attention, positions, seen, theta):
    """The same layer with loops over rows, heads and positions, in float64."""
    w_q, w_k, w_v, w_o = (
        np.asarray(w[...], np.float64)
        for w in (attention.w_q_DHA, attention.w_k_DNA, attention.w_v_DNA, attention.w_o_HAD)
    )
    share = w_q.shape[1] // w_k.shape[1]
    size = w_q.shape[2]

    def turn(vector, position):
        out = np.empty(size)
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = vector[i], vector[i + size // 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + size // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    y = np.zeros(x.shape)
    for b, row in enumerate(x.astype(np.float64)):
        for h in range(w_q.shape[1]):
            queries = [turn(token @ w_q[:, h], p) for token, p in zip(row, positions[b], strict=True)]
            keys = [turn(token @ w_k[:, h // share], p) for token, p in zip(row, positions[b], strict=True)]
            for i in range(len(row)):
                js = [j for j in range(len(row)) if seen[b, i, j]]
                scores = np.exp([queries[i] @ keys[j] / np.sqrt(size) for j in js])
                mixed = (
                    sum(s * (row[j] @ w_v[:, h // share]) for s, j in zip(scores, js, strict=True))
                    / scores.sum()
                )
                y[b, i] += mixed @ w_o[h]
    return y


def test_attention_equals_numpy():
    attention = Attention(12, 4, 2, 6, rope_theta=50.0, rngs=nnx.Rngs(0))
    x = draw((2, 7, 12))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    mask = np.array([[True] * 7, [True] * 5 + [False] * 2])
    seen = np.zeros((2, 7, 7), bool)
    for b in range(2):
        for i in range(7):
            for j in range(i + 1):
                seen[b, i, j] = segments[b, i] == segments[b, j] and (mask[b, j] or i == j)
    got_seen = causal_mask(jnp.asarray(segments), jnp.asarray(mask), 7)
    np.testing.assert_array_equal(got_seen[:, 0], seen)
    got = attention(jnp.asarray(x), positions_BS=jnp.asarray(positions), seen_BSS=got_seen)
    np.testing.assert_allclose(got, attend_in_numpy(x, attention, positions, seen, 50.0), atol=2e-6)


def test_attention_on_a_cpu_has_the_derivatives_of_jaxs():
    own, jaxs = (Attention(12, 4, 2, 6, rngs=nnx.Rngs(0), implementation=name) for name in (None, "xla"))
    given = [jnp.asarray(draw(shape)) for shape in ((2, 7, 12), (1, 4, 7, 7), (2, 7, 12))]
    seen = causal_mask(jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]]), None, 7)

    def weigh(attention, x, bias, weight):
        return jnp.sum(attention(x, seen_BSS=seen, bias_HSM=bias) * weight)

    with jax.default_matmul_precision("highest"):
        got, want = (jax.jit(jax.grad(partial(weigh, a), argnums=(0, 1)))(*given) for a in (own, jaxs))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
        # Forward mode too: along x, the derivative is the gradient times the direction.
        along = jax.jvp(lambda x: weigh(own, x, *given[1:]), (given[0],), (given[2],))[1]
        np.testing.assert_allclose(along, jnp.sum(got[0] * given[2]), rtol=1e-5)


def test_plain_causal_is_the_default():
    attention = Attention(12, 4, 2, 6, rngs=nnx.Rngs(0))
    x = draw((1, 5, 12))
    want = attend_in_numpy(x, attention, np.arange(5)[None], np.tril(np.ones((1, 5, 5), bool)), 1e4)
    np.testing.assert_allclose(attention(jnp.asarray(x)), want, atol=2e-6)


def test_grouped_heads_equal_repeated_heads():
    grouped = Attention(12, 4, 2, 6, rngs=nnx.Rngs(0))
    full = Attention(12, 4, 4, 6, rngs=nnx.Rngs(1))
    full.w_q_DHA[...] = grouped.w_q_DHA[...]
    full.w_o_HAD[...] = grouped.w_o_HAD[...]
    full.w_k_DNA[...] = jnp.repeat(grouped.w_k_DNA[...], 2, axis=1)
    full.w_v_DNA[...] = jnp.repeat(grouped.w_v_DNA[...], 2, axis=1)
    x = jnp.asarray(draw((2, 9, 12)))
    np.testing.assert_allclose(grouped(x), full(x), atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_equals_numpy(gated):
    mlp = MLP(6, 10, activation="silu" if gated else "relu", gated=gated, rngs=nnx.Rngs(0))
    x = draw((3, 4, 6))
    w_in, w_out = np.asarray(mlp.w_in_DF[...]), np.asarray(mlp.w_out_FD[...])
    if gated:
        gate = x @ np.asarray(mlp.w_gate_DF[...])
        want = (gate / (1 + np.exp(-gate)) * (x @ w_in)) @ w_out
    else:
        want = np.maximum(x @ w_in, 0) @ w_out
    np.testing.assert_allclose(mlp(jnp.asarray(x)), want, atol=1e-5)


def test_weights_have_the_stated_spread():
    attention = Attention(64, 8, 4, 16, init_scale=0.5, rngs=nnx.Rngs(0))
    # fan-in is 64 for the readers of the residual, and 8 heads of 16 = 128 for its writer.
    assert float(jnp.std(attention.w_q_DHA[...])) == pytest.approx((0.5 / 64) ** 0.5, rel=0.05)
    assert float(jnp.std(attention.w_o_HAD[...])) == pytest.approx((0.5 / 128) ** 0.5, rel=0.05)
    mlp = MLP(64, 256, rngs=nnx.Rngs(0))
    assert float(jnp.std(mlp.w_out_FD[...])) == pytest.approx(256**-0.5, rel=0.05)
    # Cut at two deviations of the underlying normal, which are 2 / 0.88 = 2.27 of the truncated one.
    assert float(jnp.abs(mlp.w_out_FD[...]).max()) < 2.3 * 256**-0.5


def test_a_gate_does_not_shift_the_other_weights():
    plain, gated = MLP(4, 8, rngs=nnx.Rngs(3)), MLP(4, 8, gated=True, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(plain.w_in_DF[...], gated.w_in_DF[...])
    np.testing.assert_array_equal(plain.w_out_FD[...], gated.w_out_FD[...])
    assert not np.array_equal(gated.w_gate_DF[...], gated.w_in_DF[...])
    other = MLP(4, 8, rngs=nnx.Rngs(4))
    assert not np.array_equal(plain.w_in_DF[...], other.w_in_DF[...])


def test_unknown_activation_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        MLP(4, 8, activation="gelo", rngs=nnx.Rngs(0))


def test_drop_features():
    x = jnp.ones((100, 100))
    key = jax.random.key(0)
    np.testing.assert_array_equal(drop_features(x, 0.5, train=False, key=key), x)
    np.testing.assert_array_equal(drop_features(x, 0.0, train=True, key=None), x)
    got = np.asarray(drop_features(x, 0.25, train=True, key=key))
    assert set(np.unique(got)) == {np.float32(0), np.float32(1 / 0.75)}
    assert got.mean() == pytest.approx(1.0, abs=0.03)
    with pytest.raises(ValueError, match="key"):
        drop_features(x, 0.25, train=True, key=None)
