"""The whole layer, its attention and a short training run on a GPU, against the CPU and the oracle."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import switchmoe as sm
from switchmoe.nn import Attention, causal_mask
from switchmoe.train import read_rows, run_training
from tests.core.worlds import ask_oracle, assert_close_to_peak, assert_trees_close, make_params, make_x
from tests.train.worlds import small_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(d_model=64, d_ff=128, num_experts=4)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def make_layer(dtype, **changes):
    """A config whose widths every kernel takes, small random weights and two rows of 48 tokens."""
    config = sm.MoEConfig(**SIZES, drop_order="token", capacity_factor=0.75, z_coef=1e-3, **changes)
    params = make_params(0, d_model=64, d_ff=128, experts=4, gated=config.gated, router_scale=0.3)
    params = params._replace(experts=jax.tree.map(lambda leaf: (leaf / 8).astype(dtype), params.experts))
    return config, params, make_x(0, 2, 48, 64).astype(dtype)


@partial(jax.jit, static_argnames="config")
def run(params, x_BSD, pull_BSD, config):
    """The layer's output and sums, and the gradients of <pull, y> plus its losses."""

    def scalar(params, x_BSD):
        y_BSD, aux = sm.moe(params, x_BSD, config, train=True)
        return jnp.sum(pull_BSD * y_BSD.astype(jnp.float32)) + sm.aux_loss(aux, config), (y_BSD, aux)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x_BSD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
@pytest.mark.parametrize(
    "choice", [dict(top_k=1), dict(router="top_k", top_k=2, gated=True, activation="silu", renormalize=True)]
)
def test_layer_is_the_cpus_and_the_oracles(dispatch, dtype, choice):
    config, params, x_BSD = make_layer(dtype, dispatch=dispatch, **choice)
    pull_BSD = make_x(7, *x_BSD.shape)
    gradients, (y_BSD, aux) = run(params, x_BSD, pull_BSD, config)
    assert all(leaf.device.platform == "gpu" for leaf in jax.tree.leaves((gradients, y_BSD, aux)))
    on_cpu = jax.device_put((params, x_BSD, pull_BSD), jax.devices("cpu")[0])
    cpu_gradients, (cpu_y_BSD, cpu_aux) = run(*on_cpu, config)
    np.testing.assert_array_equal(aux.load_E, cpu_aux.load_E)  # the same choices
    assert_close_to_peak(y_BSD, cpu_y_BSD, TOLERANCE[dtype], "y")
    assert_trees_close(aux, cpu_aux)
    assert_trees_close(gradients, cpu_gradients, TOLERANCE[dtype])

    capacity = 48 if dispatch == "dropless" else sm.capacity(48, 4, config.top_k, config.capacity_factor)
    answer = ask_oracle(params, x_BSD, config=config, capacity=capacity)
    assert_close_to_peak(y_BSD, answer.y_GTD, TOLERANCE[dtype], "y of the oracle")
    np.testing.assert_array_equal(aux.load_E, answer.sums.load_E)
    assert float(aux.dropped) == answer.sums.dropped
    assert (answer.sums.dropped > 0) == (dispatch != "dropless")


def test_the_router_is_float32_whatever_the_products_default():
    """XLA's default on a GPU rounds float32 products to tf32, 1e-3 off, and that changes choices."""
    config = sm.MoEConfig(d_model=512, d_ff=64, num_experts=8)
    params = sm.init_moe(jax.random.key(0), config)
    x_SD = make_x(3, 64, 512)
    with jax.default_matmul_precision("default"):
        _, aux = jax.jit(sm.moe, static_argnames=("config", "train"))(params, x_SD, config, train=True)
    logits = np.asarray(x_SD, np.float64) @ np.asarray(params.router, np.float64)
    z_sum = np.sum(np.log(np.exp(logits).sum(-1)) ** 2)
    assert float(aux.z_sum) == pytest.approx(z_sum, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents and padding"])
def test_cudnn_attention_is_xlas(masked):
    x_BSD = make_x(0, 2, 128, 256).astype(jnp.bfloat16)
    pull_BSD = make_x(1, 2, 128, 256)
    segments_BS = jnp.asarray(np.repeat([[1, 2], [1, 3]], 64, axis=1), jnp.int32)
    mask_BS = jnp.arange(128)[None] < jnp.array([[128], [100]])
    seen_BSS = causal_mask(segments_BS, mask_BS, 128) if masked else None
    found = {}
    for implementation in ("xla", "cudnn", None):  # which takes cudnn here
        attention = Attention(
            256, 4, 2, 64, implementation=implementation, dtype="bfloat16", rngs=nnx.Rngs(0)
        )
        graphdef, params = nnx.split(attention)

        def scalar(params, x_BSD, graphdef=graphdef):
            y_BSD = nnx.merge(graphdef, params)(x_BSD, seen_BSS=seen_BSS)
            return jnp.sum(pull_BSD * y_BSD.astype(jnp.float32)), y_BSD

        run = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))
        has_kernel = "__cudnn$fmha" in run.lower(params, x_BSD).compile().as_text()
        assert has_kernel == (implementation != "xla")
        gradients, y_BSD = run(params, x_BSD)
        found[implementation] = (y_BSD, gradients[1], nnx.to_pure_dict(gradients[0]))
    assert_trees_close(found["cudnn"], found["xla"], 2e-2)
    assert_trees_close(found[None], found["xla"], 2e-2)


def losses(tmp_path, dtype, dispatch):
    """Train a small model, of widths that every kernel takes, for twelve steps; return its losses."""
    config = small_config(tmp_path)
    moe = dataclasses.replace(config.model.moe, d_model=64, d_ff=64, dispatch=dispatch)
    model = dataclasses.replace(config.model, d_model=64, d_ff=64, moe=moe, dtype=dtype)
    result = run_training(dataclasses.replace(config, model=model), tmp_path / "runs", display="quiet")
    return [row["loss"] for row in read_rows(result.folder / "metrics.jsonl")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
def test_a_training_runs_losses_are_the_cpus(tmp_path, dispatch, dtype):
    """Twelve steps: before rounding has had the time to send tokens elsewhere."""
    code = f"""
from pathlib import Path
from tests.gpu.test_layer import losses
print(losses(Path({str(tmp_path / "cpu")!r}), {dtype!r}, {dispatch!r}))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    (tmp_path / "cpu").mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    on_gpu = losses(tmp_path, dtype, dispatch)
    printed, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors[-3000:]
    on_cpu = [float(number) for number in printed.strip().splitlines()[-1].strip("[]").split(",")]
    assert len(on_gpu) == len(on_cpu) == 4 and on_gpu[-1] < on_gpu[0]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=2e-3 if dtype == "float32" else 2e-2)
