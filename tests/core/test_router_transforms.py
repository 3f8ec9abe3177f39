"""What every router's decision does not depend on: padding, other groups, the input's type, jit, training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.routing import ExpertChoice

from .routers import (
    D_MODEL,
    GROUPS,
    MASK,
    TOKENS,
    TRACES,
    apply,
    build,
    group_keys,
    make_cases,
    params_of,
    traits_of,
)
from .worlds import assert_trees_close, make_x

every_router = pytest.mark.parametrize("case", make_cases(), ids=str)
one_of_each = pytest.mark.parametrize("case", {name: (name, o) for name, o in make_cases()}.values(), ids=str)


@one_of_each
def test_bf16_input_is_routed_in_float32(case):
    config = build(case)
    x = make_x(4, GROUPS, TOKENS, D_MODEL).astype(jnp.bfloat16)
    narrow, wide = (
        apply(params_of(config), x, config),
        apply(params_of(config), x.astype(jnp.float32), config),
    )
    assert_trees_close(narrow, wide, 1e-6)


@every_router
def test_padding_decides_nothing_for_others(case):
    # In training, where the most is looked at. Masked rows of a decision may say anything; seats may not
    # hold a masked token, nor a mixture any of it.
    config, x = build(case), make_x(5, GROUPS, TOKENS, D_MODEL)
    params, arguments = params_of(config), dict(mask=MASK, key=group_keys(), train=True)
    one = apply(params, x, config, **arguments)
    other = apply(params, jnp.where(MASK[..., None], x, -30.0), config, **arguments)
    assert bool((one.logits_GTE != other.logits_GTE)[~MASK].any()) or traits_of(config).blind
    for name, a, b in zip(one._fields, one, other, strict=True):
        if a is None:
            continue
        if name.endswith("EC") and not name.endswith("TEC"):  # a table of seats and not of tokens
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_array_equal(a[MASK], b[MASK], err_msg=name)
    if isinstance(one, ExpertChoice):
        for g in range(GROUPS):
            assert not np.isin(one.token_GEC[g], np.flatnonzero(~MASK[g])).any()


@every_router
def test_groups_are_independent_and_vmap(case):
    # A map over groups of one is, by what a map is, each group by itself.
    config, x, keys = build(case), make_x(6, GROUPS, TOKENS, D_MODEL), group_keys()
    params = params_of(config)

    def one_group(group, key):
        return apply(params, group[None], config, key=key[None], train=True)

    mapped = jax.jit(jax.vmap(one_group))(x, keys)
    whole = apply(params, x, config, key=keys, train=True)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[:, 0], mapped), whole, 1e-6)


@one_of_each
def test_a_second_call_with_other_values_is_not_traced_again(case):
    config = build(case)
    params = params_of(config)
    other = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    first = apply(params, make_x(7, GROUPS, TOKENS, D_MODEL), config, mask=MASK, key=group_keys(), train=True)
    traces = TRACES[config, True]
    second = apply(
        other, make_x(8, GROUPS, TOKENS, D_MODEL), config, mask=~MASK, key=group_keys(6), train=True
    )
    assert TRACES[config, True] == traces >= 1
    changed = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
    assert any(changed[:2])  # and it did look at the values


@every_router
def test_training_without_noise_is_evaluation(case):
    config, x, keys = build(case), make_x(9, GROUPS, TOKENS, D_MODEL), group_keys()
    params, traits = params_of(config), traits_of(config)
    trained = apply(params, x, config, train=True, key=keys)
    evaluated = apply(params, x, config, key=group_keys(7))
    if traits.draws or traits.plans:
        assert bool((trained.expert_GTK != evaluated.expert_GTK).any())
    else:
        assert_trees_close(trained, evaluated, 0)
    if traits.draws:  # other keys, other experts; the same keys, the same
        again = apply(params, x, config, train=True, key=group_keys(6))
        assert bool((trained.expert_GTK != again.expert_GTK).any())
        assert_trees_close(apply(params, x, config, train=True, key=keys), trained, 0)
