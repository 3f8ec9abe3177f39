"""A wrong configuration is refused with one sentence; named ones are what they say."""

import dataclasses

import pytest

from switchmoe.config import MoEConfig
from switchmoe.models import LMConfig, base_lm, dense_twin, flops_per_token, param_count, small_lm, tiny_lm

MOE = MoEConfig(d_model=128, d_ff=64, num_experts=4)

BAD = [
    ({"num_layers": 5}, "not a multiple of moe_every=2"),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3"),
    ({"num_heads": 3, "num_kv_heads": 1}, "set head_dim"),
    ({"head_dim": 15}, "even head_dim"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"moe_every": 0}, "moe_every is 0"),
    ({"d_ff_sparse": 0}, "d_ff_sparse is 0"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"activation": "rely"}, "did you mean 'relu'"),
    ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ({"remat": "dot"}, "did you mean 'dots'"),
    ({"attention_implementation": "cuDNN"}, "did you mean 'cudnn'"),
    ({"moe": dataclasses.replace(MOE, d_model=64)}, "moe.d_model=64 differs from d_model=128"),
    ({"moe": MOE, "d_ff_sparse": 64}, "d_ff_sparse"),
    ({"moe": dataclasses.replace(MOE, drop_order="priority")}, "drop_order='token'"),
    ({"moe": dataclasses.replace(MOE, router="top_k", top_k=2)}, "drop_order='token'"),
]


@pytest.mark.parametrize("fields, sentence", BAD, ids=[sentence for _, sentence in BAD])
def test_one_sentence(fields, sentence):
    with pytest.raises(ValueError) as caught:
        LMConfig(**fields)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message and message.endswith(".")


def test_a_router_that_leaks_is_refused_with_its_leak():
    with pytest.raises(ValueError) as caught:
        LMConfig(moe=dataclasses.replace(MOE, router="expert_choice"))
    assert str(caught.value) == (
        "router='expert_choice' does not suit a causal model, since a later token can take an earlier one's "
        "seat; choose another moe.router, or allow_future_leak=True to force it."
    )
    # In evaluation it does not leak, but a model is made to be trained.
    with pytest.raises(ValueError, match="router='sinkhorn' does not suit a causal model, since in training"):
        LMConfig(moe=dataclasses.replace(MOE, router="sinkhorn", dispatch="dropless"))


def test_without_seats_their_order_leaks_nothing():
    moe = dataclasses.replace(MOE, router="top_k", top_k=2, dispatch="dropless")
    for drop_order in ("choice", "priority"):
        assert LMConfig(moe=dataclasses.replace(moe, drop_order=drop_order))


def test_a_future_leak_can_be_forced():
    moe = dataclasses.replace(MOE, router="top_k", top_k=2)
    assert LMConfig(moe=moe, allow_future_leak=True).moe is moe
    assert LMConfig(moe=dataclasses.replace(MOE, router="soft_moe"), allow_future_leak=True)
    assert LMConfig(moe=dataclasses.replace(moe, drop_order="token"))
    assert LMConfig(moe=MOE).moe.drop_order == "choice"  # with one choice, choice order is token order


def test_configs_can_be_keys_of_compiled_functions():
    assert hash(tiny_lm()) == hash(tiny_lm()) and tiny_lm() == tiny_lm() != small_lm()


@pytest.mark.parametrize("make", [tiny_lm, small_lm, base_lm])
def test_named_configs(make):
    config = make()
    assert config.moe.drop_order == "token" and config.moe.num_experts % 8 == 0
    twin = dense_twin(config)
    assert twin.moe is None and dense_twin(twin) is twin
    assert twin.d_ff_sparse >= config.d_ff
    useful, executed = flops_per_token(config, 256)
    assert flops_per_token(twin, 256)[0] == pytest.approx(useful, rel=0.01)
    assert executed > useful


def test_sizes_of_named_configs():
    assert 0.2e6 < param_count(tiny_lm())[0] < 0.5e6
    assert 9e6 < param_count(small_lm())[0] < 12e6
    # Six dense and six sparse FFNs of 2 * 768 * 3072 weights an expert; attention, twelve times 4 * 768 ** 2.
    expert, attention = 2 * 768 * 3072, 4 * 768**2
    total, active = param_count(base_lm())
    assert total == pytest.approx(6 * expert * 65 + 12 * attention, rel=0.001)
    assert active == pytest.approx(6 * expert * 2 + 12 * attention, rel=0.01)
