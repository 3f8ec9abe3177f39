"""A dense student for a sparse teacher: what both have is copied, what only the student has is drawn."""

import dataclasses

import jax

from switchmoe.models import LMConfig
from switchmoe.shapes import ScalarKey
from switchmoe.transfer.trees import Params, draw_params, refuse_separate_blocks


def student_of(
    params: Params, config: LMConfig, *, d_ff_sparse: int | None = None, key: ScalarKey
) -> tuple[Params, LMConfig]:
    """Let a token that was sent to experts pass through one dense FFN instead, and leave it the rest.

    Embedding, attention, norms, head and the dense FFNs are the teacher's own. Each sparse layer becomes a
    dense FFN of width `d_ff_sparse`, that of one expert if None, which is drawn: Switch Transformers found
    that what is not an expert can be copied, and gained by it. `train.run_training(start=, teacher=)` then
    trains the student on the text and on the teacher's opinion of it.

    Returns:
      The weights and the config of the student.

    Raises:
      ValueError: the teacher is dense.

    Source: section 4.2, table 6, https://arxiv.org/abs/2101.03961.
    """
    dense = student_config(config, d_ff_sparse=d_ff_sparse)
    names = jax.eval_shape(lambda: draw_params(dense, key=key))
    # Only what is drawn leaves the compiled function, so nothing else is computed.
    drawn = jax.jit(lambda key: _only_here(draw_params(dense, key=key), params))(key)
    return _take(names, drawn, params), dense


def student_config(config: LMConfig, *, d_ff_sparse: int | None = None) -> LMConfig:
    """Give the shape of the student that `student_of` makes of such a model; it raises as that does."""
    refuse_separate_blocks(config)
    if config.moe is None:
        raise ValueError("the teacher is dense already; a student is made of a sparse model.")
    width = config.moe.d_ff if d_ff_sparse is None else d_ff_sparse
    if config.moe_every == 1 and config.encoder_moe_every in (None, 1):
        # No dense FFN has read these settings yet, so the experts' are the ones to take over.
        config = dataclasses.replace(config, gated=config.moe.gated, activation=config.moe.activation)
    return dataclasses.replace(config, moe=None, d_ff_sparse=None if width == config.d_ff else width)


def _only_here(params: Params, others: Params) -> Params:
    """Leave out what another model has too, by its name."""
    left = {}
    for name, value in params.items():
        if isinstance(value, dict):
            left[name] = _only_here(value, others.get(name, {}))
        elif name not in others:
            left[name] = value
    return left


def _take(names: Params, *trees: Params) -> Params:
    """Take each weight that is named from the first tree that has it."""
    taken = {}
    for name, inner in names.items():
        found = [tree[name] for tree in trees if name in tree]
        taken[name] = _take(inner, *found) if isinstance(inner, dict) else found[0]
    return taken
