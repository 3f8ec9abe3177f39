"""config.json, both ways: what older files write, what is refused, and what a model can't be written as."""

import dataclasses

import pytest

from switchmoe import models
from switchmoe.config import MoEConfig
from switchmoe.interop import WeightsError, from_hf, read_config, to_hf
from switchmoe.interop.families import write_config
from switchmoe.interop.settings import Settings
from switchmoe.models import LMConfig
from tests.interop.worlds import RECORDED, copy_of, model_of


def refusal(folder):
    with pytest.raises(WeightsError) as caught:
        read_config(folder)
    return str(caught.value)


# What a config.json may say that a model here can't be, and a word of what is said about it.
REFUSED = [
    ("mixtral", {"model_type": "mixtrel"}, "did you mean 'mixtral'"),
    ("mixtral", {"hidden_size": None}, "has no hidden_size"),
    ("mixtral", {"hidden_size": "16"}, "must have a whole number there"),
    ("mixtral", {"hidden_size": True}, "must have a whole number there"),
    ("mixtral", {"hidden_act": "gelu"}, "the exact one"),
    ("mixtral", {"attention_bias": True}, "only False is supported"),
    ("mixtral", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("mixtral", {"num_experts_per_tok": 1}, "gets no gradient"),
    ("mixtral", {"num_key_value_heads": 3}, "num_kv_heads=3"),
    ("mixtral", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0, but that is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 3}, "multiple of moe_every"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("switch", {"router_bias": True}, "router_bias"),
    ("switch", {"router_dtype": "bfloat16"}, "router_dtype"),
    ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn='gated-gelu'"),
    ("switch", {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj='gated-gelu'"),
    ("switch", {"num_layers": 12, "num_sparse_encoder_layers": 3}, "every 4 from there"),
    ("switch", {"num_sparse_decoder_layers": 0}, "num_sparse_decoder_layers=0"),
]


@pytest.mark.parametrize(("name", "settings", "word"), REFUSED, ids=lambda value: str(value)[:30])
def test_refused(name, settings, word, tmp_path):
    assert word in refusal(copy_of(name, tmp_path / "in", **settings))


def test_older_files(tmp_path):
    older = {"rope_parameters": None, "rope_theta": 50000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert read_config(copy_of("mixtral", tmp_path / "a", **older)).rope_theta == 50000.0
    # Mixtral's own default, and Llama's.
    assert read_config(copy_of("mixtral", tmp_path / "b", rope_parameters=None)).rope_theta == 1e6
    llama = read_config(copy_of("llama", tmp_path / "c", rope_parameters=None, num_key_value_heads=None))
    assert llama.rope_theta == 1e4 and llama.num_kv_heads == llama.num_heads
    qwen = read_config(copy_of("qwen3_moe", tmp_path / "d", num_local_experts=None, num_experts=6))
    assert qwen.moe is not None and qwen.moe.num_experts == 6
    shipped = read_config(copy_of("qwen3_moe", tmp_path / "e", use_sliding_window=False, sliding_window=4096))
    assert shipped.window is None


def test_what_is_read(tmp_path):
    config = read_config(copy_of("switch", tmp_path / "in", router_z_loss_coef=0.25, dropout_rate=0.5))
    assert config.moe is not None
    assert (config.encoder_layers, config.num_layers, config.moe_every) == (4, 2, 2)
    assert (config.positions, config.scale_scores, config.scale_head) == ("relative", False, True)
    assert (config.moe.expert_capacity, config.moe.z_coef, config.dropout) == (2, 0.25, 0.5)
    olmoe = read_config(copy_of("olmoe", tmp_path / "olmoe"))
    assert olmoe.moe is not None
    assert (olmoe.qk_norm, olmoe.moe.top_k, olmoe.moe.renormalize) == ("full", 3, False)
    assert (olmoe.moe.dispatch, olmoe.moe.gated, olmoe.moe.activation) == ("dropless", True, "silu")


def plain(**settings):
    moe = MoEConfig(
        d_model=16,
        d_ff=8,
        num_experts=4,
        router="top_k",
        top_k=2,
        renormalize=True,
        dispatch="dropless",
        activation="silu",
        gated=True,
    )
    given = dict(d_model=16, moe=moe, moe_every=1, activation="silu", gated=True) | settings
    return LMConfig(**given)


# Models that no family of Hugging Face's computes, by what is said about them.
HOMELESS = [
    (plain(scale_scores=False), "scale_scores=False where they have True"),
    (plain(moe_every=2, num_layers=4), "moe_every=2 where they have 1"),
    (plain(qk_norm="full", window=3), "window=3 where they have None"),
    (plain(qk_norm="full", head_dim=6), "head_dim=6 where they have 4"),
    (plain(moe=None, gated=False), "gated=False where they have True"),
    (plain(positions="relative"), "positions='relative'"),
    (LMConfig(d_model=16, moe=MoEConfig(d_model=16)), "moe.router='switch' where they have 'top_k'"),
]


@pytest.mark.parametrize(("config", "word"), HOMELESS, ids=[word[:25] for _, word in HOMELESS])
def test_models_that_transformers_has_not(config, word):
    with pytest.raises(WeightsError, match="can't be written as one of Hugging Face's") as caught:
        write_config(config, "float32")
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"moe.expert_capacity": None}, "fixed number of seats"),
        ({"moe.dispatch": "dropless"}, "fixed number of seats"),
        ({"moe.sequences_per_group": 2}, "moe.sequences_per_group=2"),
        ({"moe.shared_experts": 1}, "moe.shared_experts=1"),
        ({"moe.drop_order": "priority", "allow_future_leak": True}, "moe.drop_order='priority'"),
        ({"moe.d_ff": 8}, "d_ff=12 where they have 8"),
        ({"gated": True}, "gated=True where they have False"),
        ({"scale_head": False}, "scale_head=False where they have True"),
        ({"qk_norm": "head"}, "qk_norm='head'"),
    ],
)
def test_switch_transformers_that_transformers_has_not(change, word):
    config = model_of("switch").config
    of_moe = {name.removeprefix("moe."): value for name, value in change.items() if name.startswith("moe.")}
    rest = {name: value for name, value in change.items() if not name.startswith("moe.")}
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **of_moe), **rest)
    with pytest.raises(WeightsError) as caught:
        write_config(config, "float32")
    assert word in str(caught.value)


def test_nothing_is_written_when_refused(tmp_path):
    model = model_of("mixtral")
    with pytest.raises(ValueError, match="did you mean"):
        to_hf(model, tmp_path / "out", dtype="float23")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_shard_bytes"):
        to_hf(model, tmp_path / "out", max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


PUBLISHED = [
    models.switch_base(128),
    models.switch_large(),
    models.switch_c(),
    models.mixtral_8x7b(),
    models.olmoe_1b_7b(),
    models.qwen3_30b_a3b(),
    models.llama3_8b(),
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: f"{config.d_model}x{config.num_layers}")
def test_published_shapes_come_back(config):
    if config.encoder_layers:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_capacity=64))
    family, settings = write_config(config, "bfloat16")
    back = family.read(Settings(settings, "config.json"))
    here = dict(dtype=config.dtype, param_dtype=config.param_dtype, remat=config.remat)
    if config.moe is not None:  # how weights are drawn, and losses
        only_ours = {name: getattr(config.moe, name) for name in ("init_scale", "z_coef", "balance_over")}
        here["moe"] = dataclasses.replace(back.moe, **only_ours)
    back = dataclasses.replace(back, **here)
    assert back == dataclasses.replace(config, encoder_moe_every=back.encoder_moe_every)
    assert back.encoder_layers == 0 or back.encoder.moe_every == config.encoder.moe_every


def test_changes():
    assert from_hf(RECORDED / "llama", remat="full").config.remat == "full"
    with pytest.raises(ValueError, match="the setting='remmat' is not known; did you mean 'remat'"):
        from_hf(RECORDED / "llama", remmat="full")
