"""Weights alone, under our own names: any model, with its configuration, as it was."""

import dataclasses
import json

import pytest
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.interop import WeightsError, load_weights, save_weights
from switchmoe.models import LMConfig
from tests.interop.worlds import RECORDED, model_of, random_model, same_weights

# What no family of Hugging Face's is: shared experts, a balance bias, dense layers between, several types.
CONFIG = LMConfig(
    vocab_size=11,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    d_ff=6,
    moe=MoEConfig(
        d_model=8,
        d_ff=4,
        num_experts=3,
        router="sigmoid",
        top_k=2,
        dispatch="dropless",
        shared_experts=1,
        bias_step=1e-3,
    ),
    param_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def all_of(model):
    """Give every variable of a model, balance biases too."""
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("shard", [10**9, 500])
def test_round_trip(model, shard, tmp_path):
    save_weights(model, tmp_path / "out", max_shard_bytes=shard)
    same_weights(model, load_weights(tmp_path / "out"))
    assert "bias_E" in all_of(load_weights(tmp_path / "out"))["blocks"]["layer_1"]["feed_forward"]


def test_encoder_and_decoder(tmp_path):
    save_weights(model_of("switch"), tmp_path / "out")
    same_weights(model_of("switch"), load_weights(tmp_path / "out"))


def test_another_type_and_other_settings(model, tmp_path):
    save_weights(model, tmp_path / "out")
    wide = load_weights(tmp_path / "out", dtype="float32", remat="full")
    assert wide.config == dataclasses.replace(CONFIG, param_dtype="float32", remat="full")


def test_refused(model, tmp_path):
    with pytest.raises(WeightsError, match="model_type='mixtral' and not weights"):
        load_weights(RECORDED / "mixtral")
    save_weights(model, tmp_path / "out")
    with pytest.raises(WeightsError, match="is not empty"):
        save_weights(model, tmp_path / "out")
    with pytest.raises(WeightsError, match="has shape"):
        load_weights(tmp_path / "out", vocab_size=12)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings["model"]["depth"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="is no configuration of a model.*depth"):
        load_weights(tmp_path / "out")
