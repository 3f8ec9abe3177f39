"""Small models whose weights are made up, since drawing them would have to be compiled."""

import dataclasses
import functools

import jax
import numpy as np

from switchmoe.data import make_batch
from switchmoe.models import LMConfig
from switchmoe.transfer.trees import draw_params, with_params

TWIN = LMConfig(
    vocab_size=300,
    d_model=16,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    d_ff=24,
    d_ff_sparse=20,
    moe_every=2,
)
LLAMA = dataclasses.replace(
    TWIN, num_layers=2, d_ff_sparse=None, moe_every=1, gated=True, activation="silu", tie_embeddings=False
)
PAIR = dataclasses.replace(
    TWIN,
    num_layers=1,
    encoder_layers=1,
    moe_every=1,
    positions="relative",
    d_ff_sparse=None,
    num_kv_heads=2,
)
IDS_BS = np.random.default_rng(0).integers(3, 259, (2, 13)).astype(np.int32)
BATCH = make_batch(
    np.random.default_rng(1).integers(3, 259, (2, 14)).astype(np.uint16), np.zeros(2, np.uint8)
)


def made_up(config: LMConfig, seed: int = 0):
    """Weights of about the size that a trained model's have, norms that are not 1 among them."""
    shapes = jax.eval_shape(lambda: draw_params(config, key=jax.random.key(0)))

    def fill(path, shape):
        random = np.random.default_rng([seed, *map(ord, jax.tree_util.keystr(path))])
        if str(path[-1].key).startswith("scale"):
            return random.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        fan_in = shape.shape[-1] if path[-1].key == "embedding_VD" else shape.shape[-2]
        return (random.normal(size=shape.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree.map_with_path(fill, shapes)


@functools.cache
def _scorer(config: LMConfig):
    def score(params, ids_BS):
        source = {} if not config.encoder_layers else dict(source_BP=ids_BS[:, ::-1] + 1)
        return with_params(config, params)(ids_BS, **source)

    return jax.jit(score)


def score(config: LMConfig, params):
    """(logits, aux) of some rows; an encoder reads them backwards, a little changed."""
    return _scorer(config)(params, IDS_BS)


def apart(one, other) -> float:
    """The largest difference of two arrays, over the largest number in the first."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return np.abs(one - other).max() / np.abs(one).max()
