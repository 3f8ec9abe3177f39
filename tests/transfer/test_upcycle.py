"""Upcycling: what the sparse model computes before its first step, how its experts begin, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from switchmoe.config import MoEConfig
from switchmoe.train.given import check_weights
from switchmoe.transfer import upcycle
from switchmoe.transfer.upcycle import QUIET
from tests.checks import unchecked

from .worlds import LLAMA, PAIR, TWIN, apart, made_up, score

KEY = jax.random.key(7)
# A dense model, and how it is upcycled: a twin with a width of its own for the layers that become sparse; a
# model without super-blocks, every other FFN of which becomes sparse, top-1; encoder and decoder, with seats.
CASES = {
    "twin": (TWIN, dict(num_experts=4)),
    "switch": (LLAMA, dict(num_experts=4, top_k=1, moe_every=2)),
    "seats": (
        PAIR,
        dict(
            num_experts=4, router="top_k_then_softmax", dispatch="gather", drop_order="token",
            eval_capacity_factor=2.0,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_before_the_first_step_it_computes_what_its_parent_does(name):
    dense, settings = CASES[name]
    parent = made_up(dense)
    params, config = upcycle(parent, dense, key=KEY, **settings)
    check_weights(params, config, "the upcycled weights")
    want_BSV, _ = score(dense, parent)
    found_BSV, aux = score(config, params)
    assert apart(want_BSV, found_BSV) < 1e-5
    assert float(aux.dropped.sum()) == 0 and (np.asarray(aux.load_E) > 0).sum(axis=-1).min() >= 3

    # Other experts than copies would not do, nor weights that add to something else.
    def grow(path, weight):
        return weight * 1.01 if path[-1].key == "w_out_EFD" else weight

    assert apart(want_BSV, score(config, jax.tree.map_with_path(grow, params))[0]) > 1e-4
    if name == "switch":

        def speak_up(path, weight):
            return weight / QUIET if path[-1].key == "router_DE" else weight

        assert apart(want_BSV, score(config, jax.tree.map_with_path(speak_up, params))[0]) > 1e-3


def test_every_other_ffn_becomes_sparse_and_the_order_of_layers_stays():
    parent = made_up(LLAMA)
    params, config = upcycle(parent, LLAMA, num_experts=3, moe_every=2, key=KEY)
    assert (config.moe_every, config.num_layers) == (2, 2)
    assert config.moe == MoEConfig(
        d_model=16, d_ff=24, num_experts=3, top_k=2, router="top_k", renormalize=True, dispatch="dropless",
        activation="silu", gated=True,
    )  # fmt: skip
    layers, before = params["blocks"], parent["blocks"]["layer_0"]
    for layer in (0, 1):
        found = layers[f"layer_{layer}"]["attention"]["w_q_DHA"]
        np.testing.assert_array_equal(found, before["attention"]["w_q_DHA"][layer : layer + 1])
    kept = layers["layer_0"]["feed_forward"]
    np.testing.assert_array_equal(kept["w_in_DF"][0], before["feed_forward"]["w_in_DF"][0])
    sparse = layers["layer_1"]["feed_forward"]
    assert set(sparse) == {"router_DE", "w_in_EDF", "w_gate_EDF", "w_out_EFD"}
    for expert in range(3):
        for name, dense in {
            "w_in_EDF": "w_in_DF",
            "w_gate_EDF": "w_gate_DF",
            "w_out_EFD": "w_out_FD",
        }.items():
            np.testing.assert_array_equal(sparse[name][0, expert], before["feed_forward"][dense][1])
    assert params["head_DV"] is parent["head_DV"]


def test_noise_differs_from_expert_to_expert_and_is_as_large_as_it_says():
    parent = made_up(TWIN)
    params, _ = upcycle(parent, TWIN, num_experts=4, how="noise", noise=0.2, bias_step=1e-3, key=KEY)
    before = parent["blocks"]["layer_1"]["feed_forward"]
    after = params["blocks"]["layer_1"]["feed_forward"]
    for name, dense in {"w_in_EDF": "w_in_DF", "w_out_EFD": "w_out_FD"}.items():
        noise = np.asarray(after[name]) - before[dense][:, None]
        size = noise.std(axis=(-2, -1)) / before[dense].std(axis=(-2, -1))[:, None]
        np.testing.assert_allclose(size, 0.2, rtol=0.25)
        flat = noise.reshape(-1, noise.shape[-2] * noise.shape[-1])
        assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.3  # layers and experts of their own
    np.testing.assert_array_equal(after["bias_E"], np.zeros((2, 4)))


def test_a_share_of_the_hidden_features_starts_anew_in_all_matrices_alike():
    dense = dataclasses.replace(LLAMA, d_ff=200)
    parent = made_up(dense)
    parent["blocks"]["layer_0"]["feed_forward"]["w_in_DF"] += 3.0  # so that the mean shows
    params, _ = upcycle(parent, dense, num_experts=4, how="partial", fraction=0.25, key=KEY)
    before, after = parent["blocks"]["layer_0"]["feed_forward"], params["blocks"]["layer_0"]["feed_forward"]
    anew = np.asarray(after["w_in_EDF"]) != before["w_in_DF"][:, None]
    assert (anew.any(axis=2) == anew.all(axis=2)).all()  # whole features
    anew_LEF = anew.any(axis=2)
    assert (anew_LEF.sum(-1) == 50).all() and len({row.tobytes() for row in anew_LEF.reshape(8, -1)}) == 8
    gate, out = np.asarray(after["w_gate_EDF"]), np.asarray(after["w_out_EFD"])
    np.testing.assert_array_equal((gate != before["w_gate_DF"][:, None]).all(axis=2), anew_LEF)
    np.testing.assert_array_equal((out != before["w_out_FD"][:, None]).all(axis=3), anew_LEF)
    for expert in range(4):
        mine = anew_LEF[1, expert]
        old, new = before["w_in_DF"][1][:, mine], np.asarray(after["w_in_EDF"])[1, expert][:, mine]
        # 800 numbers: their mean and deviation are known to 4 and 3 percent of the deviation.
        assert abs(new.mean() - old.mean()) < 0.15 * old.std()
        assert new.std() == pytest.approx(old.std(), rel=0.12)


def test_sigmoid_weights_are_made_up_for_too():
    parent = made_up(TWIN)
    params, _ = upcycle(parent, TWIN, num_experts=4, router="sigmoid", key=KEY)  # two of 1 / 2 each
    out = params["blocks"]["layer_1"]["feed_forward"]["w_out_EFD"]
    np.testing.assert_allclose(out[:, 3], parent["blocks"]["layer_1"]["feed_forward"]["w_out_FD"], rtol=1e-6)
    settings = dict(router="sigmoid", renormalize=True, weight_scale=2.5)
    params, _ = upcycle(parent, TWIN, num_experts=4, key=KEY, **settings)
    scaled = params["blocks"]["layer_1"]["feed_forward"]["w_out_EFD"]
    np.testing.assert_allclose(2.5 * scaled, out, rtol=1e-6)


def test_the_type_of_the_weights_is_kept_and_the_router_is_float32():
    low = jax.tree.map(lambda a: jax.numpy.asarray(a, "bfloat16"), made_up(TWIN))
    config = dataclasses.replace(TWIN, param_dtype="bfloat16")
    params, sparse = upcycle(low, config, num_experts=2, how="partial", key=KEY)
    layer = params["blocks"]["layer_1"]["feed_forward"]
    assert {name: str(weight.dtype) for name, weight in layer.items()} == {
        "router_DE": "float32", "w_in_EDF": "bfloat16", "w_out_EFD": "bfloat16",
    }  # fmt: skip
    check_weights(params, sparse, "the upcycled weights")


@pytest.mark.parametrize(
    ("dense", "settings", "sentence"),
    [
        (TWIN, dict(how="copied"), "how='copied' is not known; did you mean 'copy'"),
        (TWIN, dict(how="partial", fraction=2.0), "noise is 0.05 and fraction 2.0"),
        (TWIN, dict(how="noise", noise=float("nan")), "noise is nan and fraction 0.5"),
        (TWIN, dict(noise=0.3), "noise=0.3 is for how='noise', but how is 'copy'"),
        (TWIN, dict(d_ff=8), "d_ff of an expert is that of the dense FFN"),
        (TWIN, dict(router="soft_moe"), "router='soft_moe' has weights that are not known to keep"),
        (TWIN, dict(router="switch"), "router='switch' sends a token to one expert, but top_k=2"),
        (TWIN, dict(shared_experts=1), "shared_experts is 1, but a shared expert would count beside"),
        (TWIN, dict(moe_every=4), "the FFNs have two widths, d_ff=24 and d_ff_sparse=20"),
        (TWIN, dict(dispatch="gather"), "set moe.drop_order='token' or moe.dispatch='dropless'"),
        (LLAMA, dict(moe_every=3), "num_layers=2 is not a multiple of moe_every=3"),
        (dataclasses.replace(TWIN, scan_layers=False), {}, "the model's layers are separate"),
        (
            dataclasses.replace(TWIN, d_ff_sparse=None, moe=MoEConfig(d_model=16, num_experts=4)),
            {},
            "the model is sparse already, with 4 experts",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_upcycled_is_refused_in_a_sentence(dense, settings, sentence):
    with unchecked(), pytest.raises(ValueError, match=sentence):
        upcycle({}, dense, key=KEY, **dict(num_experts=4) | settings)
