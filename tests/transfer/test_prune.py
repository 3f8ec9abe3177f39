"""Pruning: experts that no token chooses can go, and what stays is the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.train.given import check_weights
from switchmoe.transfer import busiest, expert_load, prune_experts, with_params

from .worlds import BATCH, PAIR, TWIN, apart, made_up

LAYER = MoEConfig(
    d_model=16, d_ff=20, num_experts=12, top_k=2, router="top_k", renormalize=True, dispatch="dropless"
)
GROUPS = dataclasses.replace(LAYER, router="sigmoid", expert_groups=4, groups_per_token=2)
HASH = MoEConfig(d_model=16, num_experts=12, router="hash", drop_order="token")
SPARSE = dataclasses.replace(TWIN, d_ff_sparse=None, moe=LAYER)


def test_what_nobody_chooses_can_go():
    # Few tokens choose few of the experts, and renormalised weights do not know the others.
    params = made_up(SPARSE)
    batch = BATCH._replace(
        **{name: getattr(BATCH, name)[:1, :4] for name in BATCH._fields[:6]}, domain_B=BATCH.domain_B[:1]
    )
    model = with_params(SPARSE, params)
    load_LE = expert_load(model, [batch, batch])
    assert load_LE.shape == (2, 12) and (load_LE.sum(axis=1) == 2 * 4 * 2).all()
    keep = int((load_LE > 0).sum(axis=1).max())
    assert 2 < keep < 10
    named_LK = busiest(load_LE, keep=keep)
    smaller, config = prune_experts(params, SPARSE, named_LK)
    check_weights(smaller, config, "what is left")
    assert config == dataclasses.replace(SPARSE, moe=dataclasses.replace(LAYER, num_experts=keep))

    @nnx.jit
    def score(model):
        ids_BS, segments_BS = jnp.asarray(batch.ids_BS), jnp.asarray(batch.segments_BS)
        return model(ids_BS, segments_BS=segments_BS)[0]

    assert apart(score(model), score(with_params(config, smaller))) < 1e-6
    old, new = (tree["blocks"]["layer_1"]["feed_forward"] for tree in (params, smaller))
    for layer, experts in enumerate(named_LK):
        np.testing.assert_array_equal(new["router_DE"][layer], old["router_DE"][layer][:, experts])
        np.testing.assert_array_equal(new["w_out_EFD"][layer], old["w_out_EFD"][layer][experts])


def test_every_weight_of_an_expert_goes_and_shared_ones_stay():
    layer = dataclasses.replace(LAYER, router="sigmoid", shared_experts=1, bias_step=1e-3)
    config = dataclasses.replace(PAIR, moe=layer)
    params = made_up(config)
    smaller, pruned = prune_experts(params, config, np.array([[1, 2, 3], [0, 4, 11]]))
    check_weights(smaller, pruned, "what is left")
    for stack, experts in ((smaller["encoder"], [1, 2, 3]), (smaller, [0, 4, 11])):
        old = (params["encoder"] if stack is smaller["encoder"] else params)["blocks"]["layer_0"][
            "feed_forward"
        ]
        new = stack["blocks"]["layer_0"]["feed_forward"]
        np.testing.assert_array_equal(new["bias_E"][0], old["bias_E"][0][experts])
        np.testing.assert_array_equal(new["w_in_EDF"][0], old["w_in_EDF"][0][experts])
        assert new["shared_w_in_EDF"] is old["shared_w_in_EDF"]


def test_the_busiest_are_named_in_order_and_ties_go_to_the_first():
    load_LE = np.array([[5.0, 0, 7, 5], [1, 1, 1, 1]])
    assert busiest(load_LE, keep=2).tolist() == [[0, 2], [0, 1]]
    with pytest.raises(ValueError, match="5 experts of 4 can't be kept"):
        busiest(load_LE, keep=5)


@pytest.mark.parametrize(
    ("config", "experts", "sentence"),
    [
        (TWIN, [[0, 1]] * 2, "the model is dense"),
        (SPARSE, [[0]] * 2, "sent to top_k=2 experts, so 1 are too few"),
        (SPARSE, [[0, 0]] * 2, "different ones of 0 to 11"),
        (SPARSE, [[0, 12]] * 2, "different ones of 0 to 11"),
        (SPARSE, [[0, 1]] * 3, "named for 3 layers"),
        (SPARSE, [[0, 1]], "named for 1 layers"),
        (dataclasses.replace(SPARSE, moe=GROUPS), [[0, 1]] * 2, "within expert_groups=4"),
        (
            dataclasses.replace(SPARSE, moe=HASH),
            [[0, 1]] * 2,
            "router='hash' sends tokens to experts by their numbers",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_pruned_is_refused_in_a_sentence(config, experts, sentence):
    params = {} if config is TWIN else made_up(config)
    with pytest.raises(ValueError, match=sentence):
        prune_experts(params, config, np.array(experts))
    if config is TWIN:
        with pytest.raises(ValueError, match="no expert to count tokens at"):
            expert_load(with_params(TWIN, made_up(TWIN)), [])
