"""Low-rank adapters: nothing at first, W + (alpha / rank) down up after that."""

import jax
import numpy as np
import pytest

from switchmoe.models.adapters import draw_adapters, is_adapter, merge_adapters

SHAPES = {"w_in_EDF": (2, 3, 8, 6), "w_gate_EDF": (2, 3, 8, 6), "w_out_EFD": (2, 3, 6, 8)}
LAYER = {
    name: np.random.default_rng(n).normal(size=shape).astype(np.float32)
    for n, (name, shape) in enumerate(SHAPES.items())
}
PARAMS = {"blocks": {"layer_0": {"feed_forward": LAYER | {"router_DE": np.ones((2, 8, 3), np.float32)}}}}


def drawn(rank=2):
    adapted = draw_adapters(PARAMS, rank=rank, key=jax.random.key(0))
    return adapted, adapted["blocks"]["layer_0"]["feed_forward"]


def test_they_change_nothing_yet_and_leave_what_was_there():
    adapted, layer = drawn()
    shapes = {name: weight.shape for name, weight in layer.items() if is_adapter(name)}
    assert shapes == {
        "w_in_down_EDJ": (2, 3, 8, 2), "w_in_up_EJF": (2, 3, 2, 6),
        "w_gate_down_EDJ": (2, 3, 8, 2), "w_gate_up_EJF": (2, 3, 2, 6),
        "w_out_down_EFJ": (2, 3, 6, 2), "w_out_up_EJD": (2, 3, 2, 8),
    }  # fmt: skip
    assert all(layer[name] is PARAMS["blocks"]["layer_0"]["feed_forward"][name] for name in SHAPES)
    merged = merge_adapters(adapted, alpha=16.0)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)
    # Their first matrices are drawn for every layer and expert, about as large as said.
    down = np.asarray(layer["w_in_down_EDJ"])
    assert len(np.unique(down)) == down.size and 0.7 < down.std() * 8**0.5 < 1.3
    assert not np.array_equal(down, layer["w_gate_down_EDJ"])


def test_merged_they_are_added_with_their_scale_in_the_type_of_the_weight():
    adapted, layer = drawn()
    for name in ("w_in_up_EJF", "w_gate_up_EJF", "w_out_up_EJD"):
        layer[name] = np.random.default_rng(9).normal(size=layer[name].shape).astype(np.float32)
    merged = merge_adapters(adapted, alpha=6.0)["blocks"]["layer_0"]["feed_forward"]
    for name, ends in {"w_in_EDF": "DF", "w_gate_EDF": "DF", "w_out_EFD": "FD"}.items():
        stem = name.removesuffix(f"_E{ends}")
        down, up = layer[f"{stem}_down_E{ends[0]}J"], layer[f"{stem}_up_EJ{ends[1]}"]
        want = np.array(LAYER[name], np.float64)
        for at in np.ndindex(2, 3):
            want[at] += 6.0 / 2 * np.asarray(down[at], np.float64) @ np.asarray(up[at], np.float64)
        np.testing.assert_allclose(merged[name], want, rtol=1e-5, atol=1e-5)
    low = jax.tree.map(lambda a: jax.numpy.asarray(a, "bfloat16"), PARAMS)
    low = merge_adapters(draw_adapters(low, rank=2, key=jax.random.key(0)), alpha=1.0)
    assert {str(weight.dtype) for weight in jax.tree.leaves(low)} == {"bfloat16"}


def test_what_has_no_experts_or_too_little_rank_is_refused():
    with pytest.raises(ValueError, match="these weights have none"):
        draw_adapters({"embedding_VD": np.ones((4, 4))}, rank=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rank is 7, but that of w_in_EDF is 6"):
        drawn(rank=7)
