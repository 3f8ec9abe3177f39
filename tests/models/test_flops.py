"""The closed forms for parameters and FLOPs against counts of the real thing."""

import dataclasses

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.config import MoEConfig
from switchmoe.models import LMConfig, dense_twin, flops_per_token, param_count
from tests.models.worlds import DENSE, SPARSE, abstract_params, count_flops, loss_of, some_ids

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


@pytest.mark.parametrize(
    "config", [SPARSE, DENSE, TOP_2, dense_twin(TOP_2)], ids=["sparse", "dense", "top_2", "twin"]
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


def test_the_router_is_counted():
    # 2 * 24 = 48 weights a feature for the expert and 4 for the router: 52 / 2 = 26 features for the twin.
    assert dense_twin(SPARSE).d_ff_sparse == 26
