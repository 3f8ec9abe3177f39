"""The two ways to run the experts on a CPU: as one batched product, and one expert after the other."""

import jax
import jax.numpy as jnp
import pytest

from switchmoe import experts

from .worlds import assert_trees_close, make_params, make_x


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_by_one_is_the_batched_product(gated, dropout, activation, monkeypatch):
    """Three experts, two groups, five seats; results and all gradients, with the same dropout noise."""
    params, x_EGCD, g_EGCD = make_params(0, gated=gated).experts, make_x(1, 3, 2, 5, 4), make_x(2, 3, 2, 5, 4)

    def run(params, x_EGCD):
        options = dict(activation=activation, dropout=dropout, key=jax.random.key(3))
        y_EGCD = experts.apply_experts(params, x_EGCD, **options)
        return jnp.vdot(y_EGCD, g_EGCD), y_EGCD

    results, loops = [], []
    for least in (10**9, 0):
        monkeypatch.setattr(experts, "SMALL_PRODUCT", least)
        program = jax.jit(jax.value_and_grad(lambda *a: run(*a), argnums=(0, 1), has_aux=True))
        loops.append(program.lower(params, x_EGCD).as_text().count("stablehlo.while"))
        results.append(program(params, x_EGCD))
    assert loops[1] == loops[0] + 2  # one forward, one backward; dropout's noise has loops of its own
    assert_trees_close(results[1], results[0])
