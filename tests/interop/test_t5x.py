"""T5X's layout of Switch Transformers: its documented names and directions, and the round trip."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from switchmoe.interop import WeightsError, from_t5x, to_t5x
from tests.interop.worlds import RECORDED, model_of, random_model, same_weights

# switch: 4 + 2 layers, D 16, F 12, 4 heads of 4, 4 experts, 61 ids, 32 buckets; layers 1 and 3 are sparse.
SHAPES = {
    "token_embedder/embedding": (61, 16),
    "encoder/relpos_bias/rel_embedding": (4, 32),
    "encoder/encoder_norm/scale": (16,),
    "encoder/layers_0/pre_attention_layer_norm/scale": (16,),
    "encoder/layers_0/attention/query/kernel": (16, 16),
    "encoder/layers_0/pre_mlp_layer_norm/scale": (16,),
    "encoder/layers_2/mlp/wi/kernel": (16, 12),
    "encoder/layers_2/mlp/wo/kernel": (12, 16),
    "encoder/layers_3/mlp/router/router_weights/w/kernel": (16, 4),
    "encoder/layers_3/mlp/expert/wi/kernel": (4, 16, 12),
    "encoder/layers_3/mlp/expert/wo/kernel": (4, 12, 16),
    "decoder/relpos_bias/rel_embedding": (4, 32),
    "decoder/decoder_norm/scale": (16,),
    "decoder/layers_1/pre_self_attention_layer_norm/scale": (16,),
    "decoder/layers_1/self_attention/out/kernel": (16, 16),
    "decoder/layers_1/pre_cross_attention_layer_norm/scale": (16,),
    "decoder/layers_1/encoder_decoder_attention/value/kernel": (16, 16),
    "decoder/layers_1/mlp/expert/wi/kernel": (4, 16, 12),
}


def test_names_and_directions():
    model = model_of("switch")
    arrays = to_t5x(model)
    assert {name: arrays[name].shape for name in SHAPES} == SHAPES
    layer = model.encoder.blocks.layer_1
    expert = arrays["encoder/layers_3/mlp/expert/wi/kernel"]
    np.testing.assert_array_equal(expert, layer.feed_forward.w_in_EDF[...][1])
    relative = arrays["decoder/relpos_bias/rel_embedding"]
    np.testing.assert_array_equal(relative, model.positions.bias_UH[...].T)
    query = arrays["encoder/layers_3/attention/query/kernel"].reshape(16, 4, 4)
    np.testing.assert_array_equal(query, layer.attention.w_q_DHA[...][1])
    out = arrays["encoder/layers_3/attention/out/kernel"].reshape(4, 4, 16)
    np.testing.assert_array_equal(out, layer.attention.w_o_HAD[...][1])


# Hugging Face's name for each part of a T5X name, by the table in its conversion script.
BLOCK = {
    "encoder": {"attention": "0.SelfAttention", "pre_attention_layer_norm": "0.layer_norm"}
    | {"mlp": "1.mlp", "pre_mlp_layer_norm": "1.layer_norm"},
    "decoder": {"self_attention": "0.SelfAttention", "pre_self_attention_layer_norm": "0.layer_norm"}
    | {"encoder_decoder_attention": "1.EncDecAttention", "pre_cross_attention_layer_norm": "1.layer_norm"}
    | {"mlp": "2.mlp", "pre_mlp_layer_norm": "2.layer_norm"},
}
INSIDE = {"query": "q", "key": "k", "value": "v", "out": "o", "wi": "wi", "wo": "wo"}


def by_their_script(name, array):
    """Give the tensors of Hugging Face's that a T5X array becomes."""
    stack, *rest = name.split("/")
    if name == "token_embedder/embedding":
        return {"shared.weight": array}
    if rest[0] == "relpos_bias":
        return {f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": array.T}
    if rest[0] == f"{stack}_norm":
        return {f"{stack}.final_layer_norm.weight": array}
    place = f"{stack}.block.{rest[0].removeprefix('layers_')}.layer.{BLOCK[stack][rest[1]]}"
    if rest[-1] == "scale":
        return {f"{place}.weight": array}
    if rest[2] == "router":
        return {f"{place}.router.classifier.weight": array.T}
    if rest[2] == "expert":
        return {f"{place}.experts.expert_{e}.{rest[3]}.weight": one.T for e, one in enumerate(array)}
    return {f"{place}.{INSIDE[rest[2]]}.weight": array.T}


def test_the_same_tensors_as_by_the_way_of_their_script():
    converted = {}
    for name, array in to_t5x(model_of("switch")).items():
        converted |= by_their_script(name, array)
    theirs = load_file(RECORDED / "switch" / "model.safetensors")
    assert converted.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(converted[key], tensor, err_msg=key)


def test_round_trip_flat_nested_and_with_an_optimizer():
    model = model_of("switch")
    arrays = to_t5x(model)
    same_weights(model, from_t5x(arrays, model.config))
    nested = {}
    for name, array in arrays.items():
        at = nested
        *folders, last = ["target", *name.split("/")]
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = array
    same_weights(model, from_t5x({**nested, "state": {"step": np.int32(3)}}, model.config))
    apart = {
        name: array.reshape(16, 4, 4) if name.endswith(("query/kernel", "key/kernel")) else array
        for name, array in arrays.items()
    }
    same_weights(model, from_t5x(apart, model.config))


def test_round_trip_gated_and_untied():
    # As Switch-XXL, which transformers has no form for.
    given = model_of("switch_all_sparse").config
    moe = dataclasses.replace(given.moe, activation="gelu", gated=True)
    config = dataclasses.replace(
        given, moe=moe, gated=True, moe_every=1, encoder_moe_every=2, dtype="bfloat16"
    )
    model = random_model(config)
    arrays = to_t5x(model)
    assert arrays["decoder/logits_dense/kernel"].shape == (16, 61)
    # wi_0 is what the activation is for.
    gate = arrays["encoder/layers_0/mlp/wi_0/kernel"]
    np.testing.assert_array_equal(gate, model.encoder.blocks.layer_0.feed_forward.w_gate_DF[...][0])
    assert {"encoder/layers_1/mlp/expert/wi_1/kernel", "encoder/layers_0/mlp/wi_1/kernel"} < arrays.keys()
    same_weights(model, from_t5x(arrays, config))
    narrow = from_t5x(arrays, config, dtype="bfloat16")
    assert narrow.embedding_VD[...].dtype == jax.numpy.bfloat16


def test_refused():
    model = model_of("switch")
    arrays = to_t5x(model)
    name = "encoder/layers_3/mlp/expert/wi/kernel"
    with pytest.raises(WeightsError, match=f"the T5X checkpoint lacks {name}"):
        from_t5x({key: array for key, array in arrays.items() if key != name}, model.config)
    with pytest.raises(WeightsError, match="has shape .4, 12, 16., but needs .4, 16, 12."):
        from_t5x(arrays | {name: arrays[name].swapaxes(1, 2)}, model.config)
    with pytest.raises(WeightsError, match="has decoder/logits_dense/kernel, which the configuration"):
        from_t5x(arrays | {"decoder/logits_dense/kernel": np.ones((16, 61))}, model.config)
    with pytest.raises(WeightsError, match="has step, which the configuration"):
        from_t5x(arrays | {"step": 3}, model.config)
    with pytest.raises(WeightsError, match="no encoder"):
        to_t5x(model_of("mixtral"))
