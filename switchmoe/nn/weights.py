"""How the weights of the dense modules are drawn: each from a key of its own, derived from the weight's name.

Adding, removing or reordering weights leaves the others exactly as they were, so two configurations that
share a layer share its initial weights too.
"""

import jax

from switchmoe.shapes import Array, Float, ScalarKey, named_key


def fan_in_normal(
    key: ScalarKey,
    name: str,
    shape: tuple[int, ...],
    *,
    inputs: int = 1,
    scale: float = 1.0,
    dtype: jax.typing.DTypeLike = "float32",
) -> Float[Array, "..."]:
    """Draw the weight called `name` so that a unit-variance token leaves it with variance `scale`.

    Truncated normal of standard deviation sqrt(scale / fan_in), where fan_in is the product of the first
    `inputs` dimensions of `shape`; the remaining ones are outputs. Switch Transformers section 2.4 (arXiv
    2101.03961) uses this rule with scale 0.1 for sparse models; the dense parts here use scale 1.0 unless a
    config says otherwise.
    """
    input_axes, output_axes = tuple(range(inputs)), tuple(range(inputs, len(shape)))
    draw = jax.nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", in_axis=input_axes, out_axis=output_axes
    )
    # In float32, so that `dtype` rounds the weights and doesn't change them.
    return draw(named_key(key, name), shape).astype(dtype)
