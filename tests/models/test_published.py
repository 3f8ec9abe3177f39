"""The published sizes: parameters by the closed form, by the model's own shapes, and as published."""

import math

import jax
import pytest
from flax import nnx

from switchmoe.models import (
    TransformerLM,
    dense_twin,
    flops_per_token,
    llama3_8b,
    mixtral_8x7b,
    olmoe_1b_7b,
    param_count,
    qwen3_30b_a3b,
    switch_base,
    switch_c,
    switch_large,
    switch_xxl,
)

# Billions of parameters, and of those a token meets where that was published: the Switch paper's table 9
# (its XXL with the 128 experts that 395B needs) and its figure 4's largest model; each of the others' papers.
PUBLISHED = {
    "switch_base_128": (switch_base(128), 7.4, None),
    "switch_base_256": (switch_base(256), 14.7, None),
    "switch_large_128": (switch_large(128), 26.3, None),
    "switch_xxl": (switch_xxl(), 395, None),
    "switch_c": (switch_c(), 1571, None),
    "llama3_8b": (llama3_8b(), 8.03, 8.03),
    "mixtral_8x7b": (mixtral_8x7b(), 46.7, 12.9),
    "olmoe_1b_7b": (olmoe_1b_7b(), 6.92, 1.28),
    "qwen3_30b_a3b": (qwen3_30b_a3b(), 30.5, 3.35),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_and_those_of_the_model(name):
    config, total, active = PUBLISHED[name]
    shapes = nnx.state(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))), nnx.Param)
    counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert param_count(config)[0] == counted
    assert counted == pytest.approx(total * 1e9, rel=0.01)
    if active is not None:
        assert param_count(config)[1] == pytest.approx(active * 1e9, rel=0.01)


def test_switch_base_of_every_published_number_of_experts():
    # Each expert more costs 12 sparse layers 2 * 768 * 3072 weights and a column of the router.
    counts = [param_count(switch_base(experts))[0] for experts in (8, 16, 32, 64, 128, 256)]
    each = 12 * (2 * 768 * 3072 + 768)
    assert [b - a for a, b in zip(counts, counts[1:], strict=False)] == [
        each * n for n in (8, 16, 32, 64, 128)
    ]
    assert counts[0] == pytest.approx(0.619e9, rel=0.01)
    # T5-Base, to which it is FLOP-matched, has 223M. Its twin's stand-ins are a little wider, for the router.
    twin = dense_twin(switch_base(128))
    assert 3072 < twin.d_ff_sparse < 1.03 * 3072
    assert param_count(twin)[0] == pytest.approx(0.223e9, rel=0.01)


def test_the_twin_of_an_encoder_decoder_costs_the_same():
    config = switch_base(8)
    sparse, dense = (flops_per_token(model, 114, 512)[0] for model in (config, dense_twin(config)))
    assert dense == pytest.approx(sparse, rel=0.01)
