"""Host memory while weights are read and written: the model's own size and two tensors at most."""

import json

from tests.devices import run_on_devices

# 62 million parameters, 247 MB in float32, in 8 shards; the embedding is the largest tensor.
MEASURE = """
import gc, json, pathlib, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from switchmoe.config import MoEConfig
from switchmoe.interop import from_hf, to_hf
from switchmoe.models import LMConfig, TransformerLM

FOLDER = pathlib.Path({folder!r})

def config(d_model, d_ff, layers):
    gated = dict(activation="silu", gated=True)
    moe = MoEConfig(d_model=d_model, d_ff=d_ff, num_experts=8, router="top_k", top_k=2, renormalize=True,
                    dispatch="dropless", **gated)
    return LMConfig(vocab_size=8192, d_model=d_model, num_layers=layers, num_heads=8, num_kv_heads=4,
                    d_ff=d_ff, moe=moe, moe_every=1, tie_embeddings=False, **gated)

def zeros(config):
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    graph, shapes, _ = nnx.split(model, nnx.Param, ...)
    shapes = nnx.to_pure_dict(shapes)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

def peak_of(work):
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = status("VmRSS")
    assert status("VmHWM") - before < 2**20
    result = work()
    return status("VmHWM") - before, result

def load(folder):
    return jax.block_until_ready(nnx.state(from_hf(folder)))

# Everything once at a small size, so that what is measured is weights and not code.
small = zeros(config(16, 8, 1))
to_hf(small, FOLDER / "small", max_shard_bytes=200_000)
load(FOLDER / "small")

large = zeros(config(512, 1536, 3))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(large)))
written, _ = peak_of(lambda: to_hf(large, FOLDER / "large", max_shard_bytes=32 * 2**20))
del large
read, state = peak_of(lambda: load(FOLDER / "large"))
assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == size
files = len(list((FOLDER / "large").glob("*.safetensors")))
print(json.dumps(dict(size=size, tensor=8192 * 512 * 4, written=written, read=read, files=files)))
"""


def test_peak_memory(tmp_path):
    measured = json.loads(run_on_devices(1, MEASURE.format(folder=str(tmp_path))).splitlines()[-1])
    assert measured["size"] > 240e6 and measured["files"] >= 8
    two = 2 * measured["tensor"]
    assert measured["size"] < measured["read"] < measured["size"] + two, measured
    assert measured["written"] < two, measured
