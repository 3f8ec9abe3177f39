"""The compiled parts of generation: reading the prompts, one step, and steps until every row has ended.

All are pure functions of a model's split state, so that weights are arguments and never part of a program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from switchmoe.infer.request import Request, Shape
from switchmoe.infer.sampling import choose_best, draw_token, log_probs, step_keys
from switchmoe.models.cache import Cache
from switchmoe.parallel import Layout
from switchmoe.shapes import Array, Bool, Float, Int


class Progress(NamedTuple):
    """Where generation stands.

    Attributes:
      cache: keys and values of all tokens but the newest.
      ids_B: the newest tokens; the pad token in rows that had ended before.
      log_prob_B: how probable the model found them; 0 where that is not asked for.
      ended_B: which rows have ended, with the newest token or before.
      step: how many new tokens there are.
    """

    cache: Cache
    ids_B: Int[Array, " B"]
    log_prob_B: Float[Array, " B"]
    ended_B: Bool[Array, " B"]
    step: Int[Array, ""]


class Programs(NamedTuple):
    """Compiled functions of (state, request), of (state, request, progress), and of (state, request)."""

    start: Callable[..., Progress]
    step: Callable[..., Progress]
    run: Callable[..., tuple[Array, Array, Array]]


@functools.lru_cache(maxsize=64)
def compile_programs(graphdef: nnx.GraphDef, layout: Layout | None, shape: Shape) -> Programs:
    """Make the programs of a model; the same ones for the same model, layout and kind of request.

    jax compiles each of them once for each shape of the rows. The progress given to `step` is used up.
    """
    start = functools.partial(_start, graphdef, layout, shape)
    step = functools.partial(_step, graphdef, layout, shape)
    run = functools.partial(_run, start, step, layout, shape)
    return Programs(jax.jit(start), jax.jit(step, donate_argnums=2), jax.jit(run))


def _start(graphdef, layout, shape: Shape, state: Any, request: Request) -> Progress:
    """Read the prompts, and choose the first new token of each row."""
    model = nnx.merge(graphdef, state)
    batch, length = request.ids_BS.shape
    source: dict[str, Any] = {}
    if request.source_BP is not None:
        encoded_BPD, _ = model.encode(request.source_BP, request.source_mask_BP, layout=layout)
        source = dict(encoded_BPD=encoded_BPD, source_mask_BP=request.source_mask_BP)
    cache = model.start_cache(batch, length + shape.room, layout=layout, **source)
    logits_BSV, cache = model.decode(request.ids_BS, cache, mask_BS=request.mask_BS, layout=layout)
    step, ended_B = jnp.zeros((), jnp.int32), request.ended_B
    return choose_tokens(shape, request, logits_BSV[:, -1], cache, ended_B, step, layout)


def _step(graphdef, layout, shape: Shape, state: Any, request: Request, progress: Progress) -> Progress:
    """Read the newest token of each row, and choose the next one."""
    # A row that has ended takes no seat and sends nothing to any expert.
    logits_BSV, cache = nnx.merge(graphdef, state).decode(
        progress.ids_B[:, None], progress.cache, mask_BS=~progress.ended_B[:, None], layout=layout
    )
    return choose_tokens(shape, request, logits_BSV[:, -1], cache, progress.ended_B, progress.step, layout)


def choose_tokens(shape: Shape, request: Request, logits_BV, cache: Any, ended_B, step, layout) -> Progress:
    """Choose a token for every row that has not ended."""
    logits_BV = _whole(layout, logits_BV)
    allowed_BV = logits_BV.at[:, request.banned_N].set(-jnp.inf, mode="drop")
    if shape.draw:
        ids_B = draw_token(
            allowed_BV,
            step_keys(request.keys_B, step),
            temperature=request.temperature,
            top_k=shape.top_k,
            top_p=request.top_p if shape.use_top_p else None,
        )
    else:
        ids_B = choose_best(allowed_BV)
    ids_B = jnp.where(ended_B, request.pad, ids_B)
    log_prob_B = log_probs(logits_BV, ids_B) if shape.log_probs else jnp.zeros(ids_B.shape, jnp.float32)
    stops_B = (ids_B[:, None] == request.stop_N).any(axis=-1)
    return Progress(cache, ids_B, jnp.where(ended_B, 0.0, log_prob_B), ended_B | stops_B, step + 1)


def _run(start, step, layout, shape: Shape, state: Any, request: Request) -> tuple[Array, Array, Array]:
    """Generate until every row has ended or there is enough: (tokens_BN, log_probs_BN, steps)."""
    progress = start(state, request)
    ids_BN = jnp.full((len(progress.ids_B), shape.room), request.pad, jnp.int32)
    log_probs_BN = jnp.zeros(ids_BN.shape, jnp.float32)

    def write(kept, progress: Progress):
        at = (0, progress.step - 1)
        return tuple(
            lax.dynamic_update_slice(whole_BN, new_B[:, None], at)
            for whole_BN, new_B in zip(kept, (progress.ids_B, progress.log_prob_B), strict=True)
        )

    def goes_on(carried) -> Bool[Array, ""]:
        progress, _ = carried
        return (progress.step < request.limit) & ~progress.ended_B.all()

    def body(carried):
        progress, kept = carried
        progress = step(state, request, progress)
        return progress, write(kept, progress)

    begun = (progress, write((ids_BN, log_probs_BN), progress))
    progress, (ids_BN, log_probs_BN) = lax.while_loop(goes_on, body, begun)
    return ids_BN, log_probs_BN, progress.step


def _whole(layout: Layout | None, x: Array) -> Array:
    """Give every device all of it: what is chosen is little work, and every process wants to read it."""
    return x if layout is None else layout.place(x, layout.sharding().spec)
