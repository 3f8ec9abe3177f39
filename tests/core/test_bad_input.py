"""Bad input is refused with one sentence that says what was wrong and what to change."""

import jax
import jax.numpy as jnp
import pytest

import switchmoe as sm
from tests.checks import unchecked

from .worlds import make_config, make_params, make_x


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(num_experts=2, router="top_k", top_k=3), r"num_experts.*top_k"),
        (dict(capacity_factor=0.0), r"capacity_factor.*above 0"),
        (dict(capacity_factor=-1.0), r"capacity_factor"),
        (dict(capacity_factor=float("nan")), r"capacity_factor"),
        (dict(eval_capacity_factor=0.0), r"eval_capacity_factor"),
        (dict(expert_capacity=0), r"expert_capacity"),
        (dict(renormalize=True), r"renormalize.*top_k"),
        (dict(router="top_k", renormalize=True), r"renormalize.*top_k"),
        (dict(router="switch", top_k=2), r"switch.*top_k"),
        (dict(router="swich"), r"router.*did you mean 'switch'"),
        (dict(router="topk"), r"router.*did you mean 'top_k'"),
        (dict(dispatch="gathr"), r"dispatch.*did you mean 'gather'"),
        (dict(activation="rleu"), r"activation.*did you mean 'relu'"),
        (dict(drop_order="tokens"), r"drop_order.*did you mean 'token'"),
        (dict(activation="zzz"), r"activation.*relu"),  # nothing is near: say what there is
        (dict(num_experts=0), r"num_experts"),
        (dict(top_k=0), r"top_k"),
        (dict(d_model=0), r"d_model"),
        (dict(d_ff=-4), r"d_ff"),
        (dict(sequences_per_group=0), r"sequences_per_group"),
        (dict(expert_dropout=1.0), r"expert_dropout"),
        (dict(jitter=-0.1), r"jitter"),
        (dict(balance_coef=-1.0), r"balance_coef"),
        (dict(z_coef=-1.0), r"z_coef"),
        (dict(init_scale=0.0), r"init_scale"),
        (dict(weight_scale=0.0), r"weight_scale"),
        (dict(input_dropout=1.0), r"input_dropout"),
        (dict(exploration="sampel"), r"exploration.*did you mean 'sample'"),
        (dict(router="top_k_then_softmax"), r"top_k=1 makes every weight 1"),
        (dict(router="gshard"), r"gshard.*top_k=1"),
        (dict(router="gshard", top_k=3), r"gshard.*top_k=3"),
        (dict(router="sigmoid", expert_groups=2), r"expert_groups=2 does not divide num_experts=3"),
        (dict(router="sigmoid", groups_per_token=2), r"groups_per_token=2 is more than expert_groups=1"),
        (dict(router="sigmoid", top_k=2, expert_groups=3), r"hold 1 experts, fewer than top_k=2"),
        (dict(router="sigmoid", expert_groups=0), r"expert_groups"),
        (dict(router="sigmoid", groups_per_token=0), r"groups_per_token"),
        # A setting that the router would not read.
        (dict(expert_groups=3), r"router='switch' does not read expert_groups, but expert_groups=3"),
        (dict(weight_scale=2.5), r"does not read weight_scale"),
        (dict(router="sigmoid", exploration="sample"), r"does not read exploration"),
        (dict(router="gshard", top_k=2, renormalize=True), r"does not read renormalize"),
        (dict(router="top_k_then_softmax", top_k=2, renormalize=True), r"does not read renormalize"),
        (dict(router="balanced", jitter=0.1), r"does not read jitter"),
        (dict(router="random", input_dropout=0.1), r"does not read input_dropout"),
        (dict(slots_per_expert=2), r"router='switch' does not read slots_per_expert"),
        (dict(load_coef=0.1), r"router='switch' does not read load_coef"),
        (dict(router="balanced", bias_step=1e-3), r"router='balanced' does not read bias_step"),
        (dict(router="sinkhorn", bias_step=1e-3), r"router='sinkhorn' does not read bias_step"),
        (dict(router="expert_choice", overflow="next"), r"router='expert_choice' does not read overflow"),
        # Dispatch, overflow, losses and the rest of a layer.
        (dict(overflow="nxt"), r"overflow.*did you mean 'next'"),
        (dict(balance_over="batches"), r"balance_over.*did you mean 'batch'"),
        (dict(dispatch="droples"), r"dispatch.*did you mean 'dropless'"),
        (dict(dispatch="dropless", overflow="next"), r"overflow='next'.*dispatch='dropless' has none"),
        (dict(matmul="loop"), r"matmul='loop'.*dispatch='gather'; leave matmul at None"),
        (dict(router="expert_choice", dispatch="dropless"), r"expert_choice.*choose dispatch='gather'"),
        (dict(router="soft_moe", dispatch="dropless"), r"soft_moe.*choose dispatch='gather'"),
        (dict(router="soft_moe", expert_capacity=2), r"soft_moe.*expert_capacity=2"),
        (dict(router="sigmoid", expert_groups=3, overflow="next"), r"overflow='next'.*groups_per_token=1"),
        (dict(shared_experts=-1), r"shared_experts"),
        (dict(slots_per_expert=0), r"slots_per_expert"),
        (dict(importance_coef=-1.0), r"importance_coef"),
        (dict(load_coef=-1.0), r"load_coef"),
        (dict(sequence_balance_coef=-1.0), r"sequence_balance_coef"),
        (dict(bias_step=-1e-3), r"bias_step"),
    ],
    ids=str,
)
def test_config_refuses(options, sentence):
    sizes = dict(d_model=4, d_ff=5, num_experts=3)
    with unchecked(), pytest.raises(ValueError, match=sentence) as caught:
        sm.init_moe(jax.random.key(0), sm.MoEConfig(**(sizes | options)))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 300


def refuse(sentence, x, config, **arguments):
    """Refused while tracing, so before anything is compiled or computed."""
    params = arguments.pop("params", None) or make_params(0)
    with unchecked(), pytest.raises(ValueError, match=sentence) as caught:
        jax.eval_shape(lambda params, x: sm.moe(params, x, config, **arguments), params, x)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")


def test_rows_must_fill_their_groups():
    refuse(r"3 rows.*sequences_per_group", make_x(0, 3, 6, 4), make_config(sequences_per_group=2))
    refuse(r"1 rows.*sequences_per_group", make_x(0, 1, 6, 4), make_config(sequences_per_group=4))
    # Rows are counted over all leading dimensions; a bare [T, D] is one group whatever the config says.
    config = make_config(sequences_per_group=3)
    for shape in ((3, 2, 6, 4), (6, 4)):
        y, _ = jax.eval_shape(lambda x: sm.moe(make_params(0), x, config), make_x(0, *shape))
        assert y.shape == shape


def test_x_must_have_tokens_of_d_model_features():
    refuse(r"d_model=4", make_x(0, 2, 6, 5), make_config())
    refuse(r"d_model=4", make_x(0, 4), make_config())
    refuse(r"no token", make_x(0, 2, 0, 4), make_config())
    refuse(r"no token", make_x(0, 0, 6, 4), make_config())


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (6,), (2, 6, 1), (2, 6, 4)])
def test_mask_must_be_the_rows_and_positions(shape):
    refuse(r"mask has shape.*positions", make_x(0, 2, 6, 4), make_config(), mask=jnp.ones(shape, bool))


def test_token_ids_must_be_the_rows_and_positions():
    for shape in ((2, 5), (6,), (2, 6, 1)):
        ids = jnp.zeros(shape, jnp.int32)
        refuse(r"token_ids has shape.*positions", make_x(0, 2, 6, 4), make_config(), token_ids=ids)
    params = make_params(0)._replace(router=())
    refuse(r"hash.*token_ids", make_x(0, 2, 6, 4), make_config(router="hash"), params=params)


def test_bias_must_have_an_entry_for_each_expert():
    for shape in ((4,), (1,), (2, 6, 3)):
        refuse(r"bias has shape.*num_experts=3", make_x(0, 2, 6, 4), make_config(), bias=jnp.zeros(shape))


def test_a_matmul_must_be_known_and_run_here():
    for name, sentence in {"blcks": "did you mean 'blocks'", "megablox": "'megablox' can't run here"}.items():
        refuse(sentence, make_x(0, 2, 6, 4), make_config(dispatch="dropless", matmul=name))


def test_noise_needs_a_key():
    for options in (dict(jitter=0.1), dict(expert_dropout=0.1)):
        refuse(rf"{next(iter(options))}.*key", make_x(0, 2, 6, 4), make_config(**options), train=True)


def test_parameters_must_be_of_the_config():
    x = make_x(0, 2, 6, 4)
    refuse(r"parameters.*config", x, make_config(num_experts=4))
    refuse(r"parameters.*config", x, make_config(d_ff=7))
    refuse(r"parameters.*gated", x, make_config(gated=True))
    refuse(r"parameters.*gated", x, make_config(), params=make_params(0, gated=True))
    refuse(r"0 shared hidden features, but shared_experts \* d_ff is 10", x, make_config(shared_experts=2))


def test_router_weights_must_be_of_the_config():
    x, params = make_x(0, 2, 6, 4), make_params(0)
    narrow = params._replace(router=params.router[:, :2])
    refuse(r"\[\(4, 2\)\], but router='switch' here has \[\(4, 3\)\]", x, make_config(), params=narrow)
    refuse(r"\[\(4, 3\)\], but router='hash' here has \[\]", x, make_config(router="hash"), params=params)


def test_route_refuses_scores_for_another_number_of_experts():
    with pytest.raises(ValueError, match="num_experts"):
        sm.route(jnp.zeros((6, 4)), make_config())


def test_config_is_frozen_hashable_and_compared_by_value():
    config = make_config(top_k=2)
    assert config == make_config(top_k=2) and hash(config) == hash(make_config(top_k=2))
    assert config != make_config(top_k=3)
    with pytest.raises(AttributeError):
        config.top_k = 3
