"""Models with rounded experts, or laid out for this machine: what they say, and the memory they take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.infer import GenerateConfig, generate, memory_table, prepare, quantize
from switchmoe.models import LMConfig, TransformerLM, mixtral_8x7b, param_count, tiny_lm, tiny_switch
from tests.core.worlds import assert_close_to_peak

MOE = MoEConfig(
    d_model=128,
    d_ff=128,
    num_experts=4,
    router="top_k",
    top_k=2,
    renormalize=True,
    dispatch="dropless",
    activation="silu",
    gated=True,
    init_scale=1.0,
)
CONFIG = LMConfig(
    vocab_size=97, d_model=128, num_layers=2, num_heads=4, num_kv_heads=2, moe=MOE, moe_every=1, gated=True
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 9)))
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


@pytest.fixture(scope="module")
def model():
    return TransformerLM(CONFIG, rngs=nnx.Rngs(0))


score = nnx.jit(lambda model, ids_BS: model(ids_BS)[0])


def expert_bytes(model):
    weights = [(str(path[-1]), leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return sum(weight.nbytes for name, weight in weights if "w_" in name and "E" in name)


def test_prepared_it_generates_the_same(model):
    before = score(model, IDS)
    prepared = prepare(model)
    assert_close_to_peak(score(prepared, IDS), before, 1e-5, "logits")
    assert_close_to_peak(score(model, IDS), before, 0, "the model that was prepared stays as it is")
    config = GenerateConfig(max_new_tokens=6)
    np.testing.assert_array_equal(
        generate(prepared, PROMPTS, config).tokens_BN, generate(model, PROMPTS, config).tokens_BN
    )
    assert prepare(prepared) is prepared


@pytest.mark.parametrize("bits, most, off", [(8, 0.27, 0.02), (4, 0.145, 0.3)])
def test_rounded_it_is_small_and_says_nearly_the_same(model, bits, most, off):
    rounded = quantize(model, bits)
    assert expert_bytes(rounded) <= most * expert_bytes(model)
    before = score(model, IDS)
    assert_close_to_peak(score(rounded, IDS), before, off, "logits of rounded weights")
    assert_close_to_peak(score(prepare(rounded), IDS), score(rounded, IDS), 1e-3, "prepared")
    assert np.abs(score(rounded, IDS) - before).max() > 1e-4  # it is rounded


def test_forms_refuse_what_can_not_be(model):
    dense = TransformerLM(dataclasses.replace(CONFIG, moe=None, d_ff=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="This model is dense"):
        quantize(dense)
    assert_close_to_peak(score(prepare(dense), IDS), score(dense, IDS), 1e-5, "dense")
    with pytest.raises(ValueError, match="laid out for generating; round the ones"):
        quantize(prepare(model))
    with pytest.raises(ValueError, match="rounded already"):
        quantize(quantize(model))
    with pytest.raises(ValueError, match="can't be trained"):
        quantize(model)(IDS, train=True)


# Mixtral 8x7B by hand. A layer: attention 4096 * (2 * 4096 + 2 * 1024) = 41,943,040; an expert 3 * 4096 *
# 14336 = 176,160,768; router 4096 * 8 = 32,768; two norms 8,192. 32 layers, 2 tables of 32000 * 4096, and the
# last norm: 46,702,792,704 with 8 experts a layer, 12,879,925,248 with 2. Experts: 32 * 8 * 176,160,768 =
# 45,097,156,608.
ALL, ACTIVE, EXPERTS, ROUTERS = 46_702_792_704, 12_879_925_248, 45_097_156_608, 32 * 32_768


def test_mixtral_by_hand():
    table = memory_table(mixtral_8x7b(), lengths=(32768,), batch=2)
    rows = {row.kept_in: row for row in table.weights}
    assert rows["float32"][1:] == (4 * ALL, 4 * ACTIVE, 4 * EXPERTS)
    assert rows["bfloat16"][1:] == (2 * ALL + 2 * ROUTERS, 2 * ACTIVE + 2 * ROUTERS, 2 * EXPERTS)
    # A scale of 4 bytes a column: 14336 + 4096 + 14336 columns an expert; in 4 bits one for 128 rows of each.
    columns = 32 * 8 * (2 * 14336 + 4096)
    rest = 2 * (ALL - EXPERTS) + 2 * ROUTERS
    assert rows["int8 experts"][1] == rest + EXPERTS + 4 * columns
    blocks = 32 * 8 * (2 * 14336 * 32 + 4096 * 112)
    assert rows["int4 experts"][1] == rest + EXPERTS // 2 + 4 * blocks
    assert rows["int4 experts"][2] == rest + (EXPERTS // 2 + 4 * blocks) // 4
    # 8 heads of 128 features, keys and values, 32 layers, in bfloat16 (computed in float32: 4 bytes).
    width = mixtral_8x7b().compute_dtype.itemsize
    assert table.cache[0].bytes == 2 * 32768 * 2 * 8 * 128 * 32 * width
    text = str(table)
    assert "186.8 GB" in text and "int4 experts" in text and "cache of 2 rows of 32,768 tokens" in text


def test_counts_what_real_models_hold(model):
    table = memory_table(CONFIG, lengths=(24,), batch=3)
    rows = {row.kept_in: row for row in table.weights}
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert rows["float32"].all_experts == real and rows["float32"].experts == expert_bytes(model)
    assert rows["int8 experts"].experts == expert_bytes(quantize(model, 8))
    assert rows["int4 experts"].experts == expert_bytes(quantize(model, 4))
    assert table.cache[0].bytes == sum(a.nbytes for a in jax.tree.leaves(model.start_cache(3, 24).layers))


@pytest.mark.parametrize("config", [CONFIG, tiny_lm(), tiny_switch(), dataclasses.replace(CONFIG, moe=None)])
def test_counts_every_model(config):
    total, active = param_count(config)
    table = memory_table(config)
    assert (table.weights[0].all_experts, table.weights[0].active) == (4 * total, 4 * active)
    assert len(table.weights) == 4


def test_leaves_out_what_can_not_be_rounded():
    odd = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, d_ff=33))
    kept_in = [row.kept_in for row in memory_table(odd).weights]
    assert kept_in == ["float32", "bfloat16", "int8 experts"]
