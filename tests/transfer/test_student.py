"""A dense student has what it shares with its sparse teacher, and draws the rest."""

import dataclasses

import jax
import numpy as np
import pytest

from switchmoe.config import MoEConfig
from switchmoe.train.given import check_weights
from switchmoe.transfer import student_of, upcycle

from .worlds import LLAMA, PAIR, TWIN, made_up

KEY = jax.random.key(3)


@pytest.mark.parametrize("width", [None, 12])
def test_all_but_the_experts_is_the_teachers(width):
    teacher, config = upcycle(made_up(PAIR), PAIR, num_experts=4, key=KEY)
    params, dense = student_of(teacher, config, d_ff_sparse=width, key=KEY)
    assert dense == dataclasses.replace(PAIR, d_ff_sparse=width)  # None: an expert's width is d_ff here
    check_weights(params, dense, "the student's weights")
    theirs, fresh = dict(jax.tree.leaves_with_path(teacher)), []
    for path, weight in jax.tree.leaves_with_path(params):
        if path in theirs:
            np.testing.assert_array_equal(weight, theirs[path])
        else:
            fresh.append(jax.tree_util.keystr(path))
    assert sorted(fresh) == [
        f"{stack}['blocks']['layer_0']['feed_forward']['{name}']"
        for stack in ("", "['encoder']")
        for name in ("w_in_DF", "w_out_FD")
    ]
    fan_in = params["blocks"]["layer_0"]["feed_forward"]["w_in_DF"].std() * PAIR.d_model**0.5
    assert 0.5 < fan_in < 1.5


def test_without_a_dense_ffn_the_students_are_made_as_the_experts_were():
    layer = MoEConfig(d_model=16, d_ff=24, num_experts=2, gated=True, activation="silu", drop_order="token")
    sparse = dataclasses.replace(LLAMA, gated=False, activation="relu", moe=layer)
    params, dense = student_of(made_up(sparse), sparse, key=KEY)
    assert dense == LLAMA
    check_weights(params, dense, "the student's weights")


def test_a_dense_teacher_is_refused():
    with pytest.raises(ValueError, match="the teacher is dense already"):
        student_of(made_up(TWIN), TWIN, key=KEY)
