"""What a layer costs in FLOPs and in arrays, counted and not timed: mistake 8 of others, and no [T, E, C].

"Sparse" code that computes every expert for every token: SwitchTransformers#17. The grouped matmul of
dispatch="dropless" has tests of its own.
"""

import math
import re

import jax
import jax.numpy as jnp

import switchmoe as sm


def trace_gradient(tokens, **options):
    config = sm.MoEConfig(**options)
    params = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config))

    def scalar(params, x):
        y, aux = sm.moe(params, x, config, train=True)
        return jnp.sum(y) + sm.aux_loss(aux, config)

    x = jax.ShapeDtypeStruct((1, tokens, config.d_model), jnp.float32)
    return jax.jit(jax.grad(scalar, argnums=(0, 1))).trace(params, x)


def test_work_does_not_grow_with_the_number_of_experts():
    # 512 tokens, D = 32, F = 128: 512 seats at 8 experts and at 64, each 4 D F = 16,384 FLOPs forward and 3
    # times that with the gradient. The router's product is 2 D E = 4,096 a token at 64 experts, a quarter of
    # it; all experts for every token would be 8 times as much. There is no loop, whose body is counted once.
    flops = {}
    for experts in (8, 64):
        traced = trace_gradient(512, d_model=32, d_ff=128, num_experts=experts, capacity_factor=1.0)
        assert not any(loop in str(traced.jaxpr) for loop in ("while[", "scan["))
        flops[experts] = traced.lower().compile().cost_analysis()["flops"]
    least = 3 * 512 * 4 * 32 * 128
    assert least <= flops[8] < 1.3 * least
    assert flops[64] < 1.5 * flops[8]


def test_nothing_has_a_place_for_every_token_expert_and_seat():
    # 96 tokens, 6 experts, 16 seats: a table of all three has 9,216 entries, all others fewer than 1,000.
    sizes = dict(d_model=4, d_ff=8, num_experts=6, capacity_factor=1.0)
    largest = {}
    for dispatch in ("gather", "einsum"):
        shapes = re.findall(
            r"\b[a-z]+\d*\[([\d,]+)\]", str(trace_gradient(96, dispatch=dispatch, **sizes).jaxpr)
        )
        largest[dispatch] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest["gather"] < 1000 and largest["einsum"] == 96 * 6 * 16
