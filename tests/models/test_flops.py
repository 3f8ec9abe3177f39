"""The closed forms for parameters and FLOPs against counts of the real thing."""

import dataclasses

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.config import MoEConfig
from switchmoe.models import LMConfig, TransformerLM, dense_twin, flops_per_token, param_count
from switchmoe.models.layer_cost import executed_products, layer_weights, useful_products
from switchmoe.routing import ROUTERS
from tests.models import worlds
from tests.models.worlds import DENSE, SPARSE, count_flops, loss_of, some_ids

TOP_2 = dataclasses.replace(
    SPARSE,
    num_layers=3,
    moe_every=1,
    tie_embeddings=False,
    gated=True,
    head_dim=6,
    moe=MoEConfig(
        d_model=16,
        d_ff=40,
        num_experts=4,
        router="top_k",
        top_k=2,
        gated=True,
        drop_order="token",
        sequences_per_group=2,
    ),
)
EINSUM = dataclasses.replace(
    SPARSE, moe=dataclasses.replace(SPARSE.moe, dispatch="einsum", capacity_factor=1.5)
)


# An encoder of other super-blocks than the decoder's, and all that a published model has beside.
BOTH = dataclasses.replace(
    SPARSE,
    encoder_layers=3,
    encoder_moe_every=3,
    positions="relative",
    qk_norm="full",
    tie_embeddings=False,
    head_dim=6,
)
BOTH_DENSE = dataclasses.replace(BOTH, moe=None, qk_norm="head")


def abstract_params(config):
    """A model with jax's attention: on a CPU our own takes some sums as products, which would be counted."""
    return worlds.abstract_params(dataclasses.replace(config, attention_implementation="xla"))


def with_moe(allow_future_leak=False, **moe):
    """SPARSE with other settings of its layers, of 384 weights an expert."""
    layers = dataclasses.replace(SPARSE.moe, **moe)
    return dataclasses.replace(SPARSE, moe=layers, allow_future_leak=allow_future_leak)


# Each router with settings of its own; groups of 24 tokens.
ROUTED = {
    name: with_moe(allow_future_leak=True, router=name, capacity_factor=1.5, **settings)
    for name, settings in {
        **dict.fromkeys(ROUTERS, {}),
        **dict.fromkeys(["top_k", "top_k_then_softmax", "gshard", "noisy_top_k", "hash"], {"top_k": 2}),
        "soft": {"top_k": 4},
        "soft_moe": {"slots_per_expert": 3},
        "expert_choice": {"top_k": 2},
        "sigmoid": {"top_k": 2, "shared_experts": 2, "gated": True, "bias_step": 0.1},
    }.items()
}


@pytest.mark.parametrize(
    "config",
    [SPARSE, DENSE, TOP_2, dense_twin(TOP_2), BOTH, BOTH_DENSE, dense_twin(BOTH)],
    ids=["sparse", "dense", "top_2", "twin", "both", "both_dense", "both_twin"],
)
def test_parameters_by_counting(config):
    _, state = abstract_params(config)
    total, active = param_count(config)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(state))
    if config.moe is None:
        assert active == total
    else:
        experts = sum(
            leaf.size for path, leaf in nnx.to_flat_state(state) if "EDF" in path[-1] or "EFD" in path[-1]
        )
        assert (
            total - active == experts * (config.moe.num_experts - config.moe.top_k) // config.moe.num_experts
        )


def counted(config, ids, *, train):
    """FLOPs of all matrix products of a forward pass, or of a training step, per token."""
    graphdef, params = abstract_params(config)
    forward = lambda params: nnx.merge(graphdef, params)(ids, train=True)  # noqa: E731
    step = jax.value_and_grad(loss_of(graphdef, config, ids)) if train else forward
    return count_flops(jax.make_jaxpr(step)(params).jaxpr) / ids.size


@pytest.mark.parametrize("config", [DENSE, dense_twin(TOP_2)], ids=["dense", "twin"])
def test_dense_flops_are_exact(config):
    ids = some_ids()
    useful, executed = flops_per_token(config, ids.shape[1])
    assert useful == executed == 3 * counted(config, ids, train=False) == counted(config, ids, train=True)


@pytest.mark.parametrize("config", [BOTH_DENSE, BOTH], ids=["dense", "sparse"])
def test_flops_with_an_encoder_are_a_mean_over_both_kinds_of_tokens(config):
    ids, source = some_ids(length=10), some_ids()
    graphdef, params = abstract_params(config)
    forward = lambda params: nnx.merge(graphdef, params)(ids, source_BP=source, train=True)  # noqa: E731
    flops = 3 * count_flops(jax.make_jaxpr(forward)(params).jaxpr) / (ids.size + source.size)
    useful, executed = flops_per_token(config, 10, 24)
    if config.moe is None:
        assert useful == pytest.approx(flops, rel=1e-12) and executed == useful
    else:
        assert 1.0 <= flops / executed < 1.05 and useful < executed


def test_who_has_an_encoder_says_how_long_its_rows_are():
    with pytest.raises(ValueError, match="encoder_layers is 3, but source_length is None; give the length"):
        flops_per_token(BOTH, 10)
    with pytest.raises(ValueError, match="encoder_layers is 0, but source_length is 24; .* None where"):
        flops_per_token(SPARSE, 10, 24)


@pytest.mark.parametrize("name", ROUTED)
def test_parameters_of_every_router_by_counting(name):
    config = ROUTED[name]
    total, active = param_count(config)
    # A balance bias is no parameter.
    assert total == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)[1]))
    idle = 0 if name == "soft_moe" else 4 - config.moe.top_k
    assert total - active == 2 * idle * (3 if config.moe.gated else 2) * 16 * 24


def test_a_layer_s_cost_by_hand():
    # D 16, F 24, E 4, groups of 24 tokens: an expert has 2 * 16 * 24 = 768 weights, a router 16 * 4 = 64.
    def cost(name, **changes):
        moe = dataclasses.replace(ROUTED[name].moe, **changes)
        return useful_products(moe, 24), executed_products(moe, 24), *layer_weights(moe)

    # 1.5 * 24 / 4 = 9 seats an expert: 36 seats for 24 tokens, 1.5 experts a token.
    assert cost("switch") == (64 + 768, 64 + 1.5 * 768, 64 + 4 * 768, 64 + 768)
    assert cost("switch", dispatch="dropless") == (64 + 768, 64 + 768, 64 + 4 * 768, 64 + 768)
    # The one-hot products carry 36 seats to and fro for each token.
    assert cost("switch", dispatch="einsum")[1] == 64 + 1.5 * 768 + 2 * 36 * 16
    assert cost("hash") == (2 * 768, 3 * 768, 4 * 768, 2 * 768)
    assert cost("noisy_top_k") == (128 + 2 * 768, 128 + 3 * 768, 128 + 4 * 768, 128 + 2 * 768)
    assert cost("soft") == (64 + 4 * 768, 64 + 4 * 768, 64 + 4 * 768, 64 + 4 * 768)
    # Two shared experts are met by all; a gated expert has 1152 weights.
    always = 64 + 2 * 1152
    assert cost("sigmoid") == (always + 2 * 1152, always + 3 * 1152, always + 4 * 1152, always + 2 * 1152)
    # Experts choose 18 tokens each, 72 in all for 24 tokens: 3 experts a token, and no seat is empty.
    assert cost("expert_choice") == (64 + 3 * 768, 64 + 3 * 768, 64 + 4 * 768, 64 + 2 * 768)
    # 4 experts of 3 slots: each token is scored by 12 slots, mixed into 12 and out of 12, of 16 features;
    # 12 mixtures for 24 tokens are half an expert a token. The scale is a parameter and no matrix.
    assert cost("soft_moe") == (*[3 * 192 + 0.5 * 768] * 2, *[193 + 4 * 768] * 2)


@pytest.mark.parametrize("name", ["hash", "noisy_top_k", "soft_moe", "expert_choice", "sigmoid"])
def test_flops_of_other_routers_are_those_executed(name):
    ids = some_ids()
    graphdef, params, rest = nnx.split(
        nnx.eval_shape(lambda: TransformerLM(ROUTED[name], rngs=nnx.Rngs(0))), nnx.Param, ...
    )

    def forward(params, rest):
        return nnx.merge(graphdef, params, rest)(ids, train=True, key=jax.random.key(0))

    flops = count_flops(jax.make_jaxpr(forward)(params, rest).jaxpr) / ids.size
    assert 1.0 <= 3 * flops / flops_per_token(ROUTED[name], ids.shape[1])[1] < 1.06


@pytest.mark.parametrize("config", [SPARSE, TOP_2, EINSUM], ids=["sparse", "top_2", "einsum"])
def test_sparse_flops_are_those_executed(config):
    ids = some_ids()
    useful, executed = flops_per_token(config, ids.shape[1])
    # The sums of aux and the weighting of k results are products too, of 4 to 16 terms: some per cent here.
    assert 1.0 <= 3 * counted(config, ids, train=False) / executed < 1.05
    assert useful < executed or config.moe.capacity_factor == 1.0


def test_the_compiler_counts_about_the_same():
    # One super-block of two layers, since the compiler counts the body of a loop once. It counts element-wise
    # work too (norms, softmax, rotations), which at these sizes is up to a tenth.
    config = LMConfig(vocab_size=64, d_model=64, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=256)
    graphdef, params = abstract_params(config)
    ids = some_ids(rows=2, length=32)
    compiled = jax.jit(lambda params: nnx.merge(graphdef, params)(ids)[0]).lower(params).compile()
    ratio = compiled.cost_analysis()["flops"] / ids.size / (flops_per_token(config, 32)[0] / 3)
    assert 1.0 <= ratio < 1.1


@given(
    d_ff=st.integers(8, 4096),
    experts=st.sampled_from([2, 8, 64, 512]),
    k=st.integers(1, 2),
    gated=st.booleans(),
    gated_experts=st.booleans(),
    moe_every=st.sampled_from([1, 2]),
)
def test_the_twin_costs_the_same(d_ff, experts, k, gated, gated_experts, moe_every):
    moe = MoEConfig(
        d_model=128,
        d_ff=d_ff,
        num_experts=experts,
        router="top_k",
        top_k=k,
        gated=gated_experts,
        drop_order="token",
    )
    config = LMConfig(moe=moe, gated=gated, moe_every=moe_every)
    assert flops_per_token(dense_twin(config), 128)[0] == pytest.approx(
        flops_per_token(config, 128)[0], rel=0.01
    )


@pytest.mark.parametrize("name", ROUTED)
def test_the_twin_of_every_router_costs_the_same(name):
    # Wider experts, so that rounding to whole features is little.
    config = ROUTED[name]
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, d_ff=480))
    twin = dense_twin(config, 24)
    assert flops_per_token(twin, 24)[0] == pytest.approx(flops_per_token(config, 24)[0], rel=0.01)


def test_a_cost_that_depends_on_the_rows_wants_their_length():
    for name in ("soft_moe", "expert_choice"):
        with pytest.raises(ValueError, match=f"router='{name}' costs .* say the length of a row"):
            dense_twin(ROUTED[name])


def test_the_router_is_counted():
    # 2 * 24 = 48 weights a feature for the expert and 4 for the router: 52 / 2 = 26 features for the twin.
    assert dense_twin(SPARSE).d_ff_sparse == 26
