"""Where NVIDIA's fused attention is taken, and what is said where it can't be; tests/gpu runs it."""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.nn import Attention, causal_mask, cudnn

HOPPER = SimpleNamespace(device_kind="H100", compute_capability="9.0", platform="gpu")
AMPERE = SimpleNamespace(device_kind="A100", compute_capability="8.0", platform="gpu")


def make_attention(dtype="bfloat16", implementation=None, **options):
    sizes: dict[str, Any] = dict(d_model=32, num_heads=4, num_kv_heads=2, head_dim=8) | options
    return Attention(**sizes, dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0))


def on_gpu(device=HOPPER):
    """Let the module believe that this process runs on a GPU, for tracing alone."""
    patches: dict[str, Any] = {
        "platform_name": lambda: "cuda",
        "jax": mock.Mock(wraps=jax, devices=lambda: [device]),
    }
    patches["jax"].config = SimpleNamespace(jax_default_device=None)
    both = contextlib.ExitStack()
    both.enter_context(mock.patch.multiple(cudnn, **patches))
    both.enter_context(mock.patch("jax.default_backend", lambda: "gpu"))
    return both


def asked_of_jax(attention, length=128, **inputs):
    """What `jax.nn.dot_product_attention` is called with: the implementation, and the dtypes of q and k.

    None where it isn't called.
    """
    seen = []
    plain = jax.nn.dot_product_attention

    def record(q, k, v, *args, implementation, **options):
        seen.append((implementation, q.dtype, k.dtype))
        return plain(q, k, v, *args, **options)

    x_BSD = jnp.zeros((1, length, 32), jnp.bfloat16)
    with mock.patch("jax.nn.dot_product_attention", record):
        jax.eval_shape(lambda x_BSD: attention(x_BSD, **inputs), x_BSD)
    return seen[0] if seen else None


@pytest.mark.parametrize("options", [{}, {"qk_norm": "head"}, {"qk_norm": "full"}, {"rope_theta": None}])
def test_none_takes_it_in_bfloat16_on_a_hopper_gpu(options):
    attention, bf16 = make_attention(**options), jnp.bfloat16
    with on_gpu():
        assert asked_of_jax(attention) == ("cudnn", bf16, bf16)  # which must be alike
        assert asked_of_jax(attention, seen_BSS=causal_mask(None, None, 128)) == ("cudnn", bf16, bf16)
    assert asked_of_jax(attention) is None


def test_none_leaves_it_where_it_might_not_run():
    with on_gpu():
        assert asked_of_jax(make_attention(dtype="float32"))[0] is None
        assert asked_of_jax(make_attention(implementation="xla"))[0] == "xla"
        attention = make_attention()
        assert asked_of_jax(attention, length=127)[0] is None
        assert asked_of_jax(attention, length=64)[0] is None
        assert asked_of_jax(make_attention(head_dim=12))[0] is None
        assert asked_of_jax(make_attention(head_dim=136))[0] is None
        bias_HSM = jnp.zeros((1, 4, 128, 128))
        assert asked_of_jax(attention, bias_HSM=bias_HSM)[0] is None
        offered = attention.keys_values(jnp.zeros((1, 128, 32)), jnp.zeros((1, 128), int))
        assert asked_of_jax(attention, offered=offered)[0] is None
    with on_gpu(AMPERE):
        assert asked_of_jax(attention)[0] is None


def test_on_a_cpu_the_result_is_that_of_xla():
    x_BSD = jax.random.normal(jax.random.key(0), (2, 128, 32), jnp.bfloat16)
    attention, xla = make_attention(), make_attention(implementation="xla")
    np.testing.assert_allclose(*(np.float32(run(x_BSD)) for run in (attention, xla)), atol=2e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "'cudnn' can't run here: its kernel multiplies bfloat16, not float32"),
        ({"head_dim": 12}, "multiple of 8 features up to 256, not 12"),
        ({"head_dim": 512}, "multiple of 8 features up to 256, not 512"),
    ],
)
def test_what_a_config_shows_is_said_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        make_attention(implementation="cudnn", **options)


def test_what_only_a_call_shows_is_said_then():
    attention = make_attention(implementation="cudnn")
    with pytest.raises(ValueError, match="is for NVIDIA GPUs, and this process runs on cpu, or take None"):
        asked_of_jax(attention)
    with on_gpu():
        assert asked_of_jax(attention)[0] == "cudnn"
        with pytest.raises(ValueError, match="even lengths, not 127 tokens that see 127"):
            asked_of_jax(attention, length=127)
