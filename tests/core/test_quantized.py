"""Weights of 8 and 4 bits: rounding, packing, products, and the layer with experts made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.experts import quantize_experts
from switchmoe.quantized import BLOCK, dequantize_weight, multiply, quantize_weight, unpack
from switchmoe.served_experts import serve_experts

from .worlds import assert_close_to_peak, assert_trees_close, make_config, make_params, make_x, moe


def dequantize(experts):
    pairs = experts.matrices.items()
    return experts.__class__(**{f"{name}_{dims(name)}": dequantize_weight(*pair) for name, pair in pairs})


def dims(name):
    return "EFD" if name == "w_out" else "EDF"


def test_golden():
    # Column 0: largest 12.7, so steps of 0.1: 12.7 -> 127, -0.26 -> -2.6 -> -3. Column 1 is 0, scale and all.
    values, scale = quantize_weight(jnp.array([[12.7, 0.0], [-0.26, 0.0]]), 8)
    assert values.dtype == jnp.int8 and values.tolist() == [[127, 0], [-3, 0]]
    np.testing.assert_allclose(scale, [[0.1, 0.0]], rtol=1e-6)
    # In 4 bits steps of 0.5: 3.75 -> 7.5, cut to 7, -1.1 -> -2; each plus 8, 15 in the lower half and 6 in
    # the upper one. In the other column -3.75 -> -8 and 0 -> 0, which is 0 + 16 * 8.
    values, scale = quantize_weight(jnp.array([[3.75, -3.75], [-1.1, 0.0]]), 4)
    assert values.dtype == jnp.uint8 and values.tolist() == [[15 + 16 * 6, 16 * 8]]
    assert unpack(values).tolist() == [[7, -8], [-2, 0]] and scale.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("bits, blocks", [(8, 1), (4, 2)])
def test_each_weight_is_off_by_half_a_step_at_most(bits, blocks):
    w_EIO = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2 * BLOCK, 5)), jnp.float32)
    values, scale_EQO = quantize_weight(w_EIO, bits)
    assert values.nbytes * 8 == w_EIO.size * bits and scale_EQO.shape == (3, blocks, 5)
    error = np.abs(dequantize_weight(values, scale_EQO) - w_EIO).reshape(3, blocks, -1, 5)
    assert (error <= 0.5001 * scale_EQO[:, :, None]).all() and error.max() > 0.4 * scale_EQO.max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [2 * BLOCK, 6, 20 * BLOCK])
def test_only_the_weights_are_rounded(bits, rows):
    """A row in 16 bits is off by 1/65,000 of its largest entry, whatever the other rows hold."""
    rng = np.random.default_rng(0)
    pair = quantize_weight(jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32), bits)
    x_RI = jnp.asarray(rng.standard_normal((4, rows)) * 10.0 ** np.arange(-3, 1)[:, None], jnp.float32)
    x_RI = x_RI.at[1].set(0)
    actual, expected = jax.jit(multiply)(x_RI, *pair), x_RI @ dequantize_weight(*pair)
    for row in range(4):
        assert_close_to_peak(actual[row], expected[row], 1e-4, f"row {row}")
    assert not actual[1].any()
    assert multiply(x_RI.astype(jnp.bfloat16), *pair).dtype == jnp.bfloat16


def test_a_nan_stays_a_nan():
    pair = quantize_weight(jnp.ones((4, 2)), 8)
    y_RO = multiply(jnp.ones((2, 4)).at[1, 2].set(jnp.nan), *pair)
    assert np.isfinite(y_RO[0]).all() and np.isnan(y_RO[1]).all()


@pytest.mark.parametrize(
    "length, dispatch, bits", [(3, "dropless", 8), (40, "dropless", 8), (40, "dropless", 4), (3, "gather", 4)]
)
def test_the_layer_is_that_of_the_rounded_weights(length, dispatch, bits):
    config = make_config(d_ff=6, dispatch=dispatch, top_k=2, gated=True, drop_order="token")
    params, x_SD = make_params(0, d_ff=6, gated=True), make_x(1, length, 4)
    rounded = quantize_experts(params.experts, bits)
    expected = moe(params._replace(experts=dequantize(rounded)), x_SD, config)
    for experts in (rounded, serve_experts(rounded)):
        y_SD, aux = moe(params._replace(experts=experts), x_SD, config)
        assert_close_to_peak(y_SD, expected[0], 1e-4, type(experts).__name__)
        assert_trees_close(aux, expected[1])


def test_refuses_what_can_not_be():
    params = make_params(0)
    with pytest.raises(ValueError, match="bits is 2, but weights are rounded to 8 or 4 bits"):
        quantize_experts(params.experts, 2)
    with pytest.raises(ValueError, match="A matrix of 5 rows can't be kept in 4 bits"):
        quantize_experts(params.experts, 4)
    rounded = quantize_experts(params.experts)
    with pytest.raises(ValueError, match="rounded already"):
        quantize_experts(rounded)
    with pytest.raises(ValueError, match="can't be trained"):
        moe(params._replace(experts=rounded), make_x(1, 6, 4), make_config(), train=True)
