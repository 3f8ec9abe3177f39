"""Small models to generate with, and what they should generate: whole passes, without a cache."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.infer import GenerateConfig
from switchmoe.models import LMConfig, TransformerLM

DROPLESS, DENSE, CAPACITY, ENCODER = "dropless", "dense", "capacity", "encoder"
_SPARSE = MoEConfig(
    d_model=16, d_ff=24, num_experts=4, router="top_k", top_k=2, renormalize=True, dispatch="dropless"
)
_SEATED = MoEConfig(d_model=16, d_ff=24, num_experts=4, eval_capacity_factor=1.0)
_ROTARY = LMConfig(
    vocab_size=23, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, moe=_SPARSE, moe_every=1
)
CONFIGS = {
    # Rotary positions, grouped heads, norms of heads.
    DROPLESS: dataclasses.replace(_ROTARY, qk_norm="head"),
    # Relative positions, a window, a norm of all heads together, two layers in a super-block.
    DENSE: dataclasses.replace(
        _ROTARY,
        moe=None,
        moe_every=2,
        positions="relative",
        relative_buckets=8,
        window=5,
        qk_norm="full",
    ),
    CAPACITY: dataclasses.replace(_ROTARY, moe=_SEATED),
    ENCODER: dataclasses.replace(
        _ROTARY,
        moe=dataclasses.replace(_SEATED, expert_capacity=3),
        encoder_layers=2,
        positions="relative",
        relative_buckets=8,
        scale_scores=False,
        scale_head=True,
        num_kv_heads=4,
    ),
}
# Rows of different lengths, one of them longer than the window, in one bucket.
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
GREEDY = GenerateConfig(max_new_tokens=9, log_probs=True)
DRAWN = dataclasses.replace(GREEDY, temperature=1.0, top_k=9, top_p=0.95)


def random_model(config: LMConfig) -> TransformerLM:
    """A model with weights drawn on the host, which compiles nothing, so large that its choices are clear."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        scale = "scale" in jax.tree_util.keystr(path)
        return jax.numpy.asarray(1 + 0.1 * noise if scale else 0.6 * noise, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, shapes))


@functools.cache
def model_of(name: str) -> TransformerLM:
    """The model of a named config."""
    return random_model(CONFIGS[name])


@functools.cache
def _scores(name: str):
    graphdef, _ = nnx.split(model_of(name))
    run = jax.jit(lambda state, ids, options: nnx.merge(graphdef, state).trace(ids, **options))
    return lambda ids, options: run(nnx.state(model_of(name)), ids, options)


def whole_pass(name: str, rows, *, source=None):
    """The log probabilities that one pass over whole rows gives, and the trace of its routing.

    Rows are padded behind, the other side than where generation pads.
    """
    ids, mask = _behind(rows, 24)
    options = {"mask_BS": mask}
    if source is not None:
        options["source_BP"], options["source_mask_BP"] = _behind(source, 16)
    logits, _, trace = _scores(name)(ids, options)
    logits = np.asarray(logits, np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)), trace


def _behind(rows, length):
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, True
    return ids, mask
