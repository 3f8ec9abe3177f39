"""Continuing texts with a language model: prompts in, new tokens out, all at once or as they come."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from switchmoe.infer.config import GenerateConfig
from switchmoe.infer.prompts import Prompts, Tokenizer
from switchmoe.infer.request import Shape, make_request
from switchmoe.infer.results import Generated, NewTokens, collect
from switchmoe.infer.seating import choose_seating
from switchmoe.infer.steps import Programs, Progress, compile_programs
from switchmoe.models import TransformerLM
from switchmoe.parallel import Layout, stored_as
from switchmoe.shapes import ScalarKey


def generate(
    model: TransformerLM,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    key: ScalarKey | None = None,
    row_ids: Sequence[int] | None = None,
    decoder_prompts: Prompts | None = None,
    layout: Layout | None = None,
) -> Generated:
    """Continue each prompt, token by token, until it chooses a stop token or is long enough.

    A row's tokens depend on its own prompt, its id and the key alone, not on its place in the batch, on the
    other rows, or on padding. (Sums are rounded differently in batches of other shapes, so where two tokens
    are equally probable but for that, the other one may be chosen.)

    The prompts are read at once, and each new token looks at keys and values that are kept. That is one
    program, compiled once for a number of rows, of prompt tokens and of new tokens, the last two rounded up
    (`bucket_length`); another temperature, top_p, or prompt needs no other one.

    Args:
      model: with its weights; they may lie on a mesh already.
      prompts: texts, or rows of token ids, of any lengths. For a model with an encoder, what that reads.
      config: how tokens are chosen and when rows end.
      tokenizer: what turns texts into ids and back: `encode(text)` and `decode(ids)`.
      key: source of the draws; needed if the temperature is above 0.
      row_ids: whole numbers that tell the rows' draws apart; 0, 1, ... if None. Two rows of the same id and
        prompt are the same.
      decoder_prompts: with an encoder, what the decoder begins with; `config.start_token` if None.
      layout: how rows, experts and weights are split over a mesh; None for one device.

    Raises:
      ValueError: one sentence, before anything is compiled, if something does not fit.
    """
    config = config or GenerateConfig()
    request, shape, rows = make_request(
        model.config,
        config,
        prompts,
        tokenizer=tokenizer,
        key=key,
        row_ids=row_ids,
        decoder_prompts=decoder_prompts,
        layout=layout,
    )
    programs, state = prepare_model(model, config, shape, layout)
    ids_BN, log_probs_BN, steps = jax.device_get(programs.run(state, request))
    return collect(ids_BN[:rows, : int(steps)], log_probs_BN[:rows, : int(steps)], config, tokenizer)


def stream(
    model: TransformerLM,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    key: ScalarKey | None = None,
    row_ids: Sequence[int] | None = None,
    decoder_prompts: Prompts | None = None,
    layout: Layout | None = None,
) -> Iterator[NewTokens]:
    """Do what `generate` does, and hand over the new tokens of all rows as they are chosen.

    The same tokens, by the same functions, called once a token from the host. Arguments are checked at once,
    before the first token is asked for. `TextStream` makes texts of one row's tokens.
    """
    config = config or GenerateConfig()
    request, shape, rows = make_request(
        model.config,
        config,
        prompts,
        tokenizer=tokenizer,
        key=key,
        row_ids=row_ids,
        decoder_prompts=decoder_prompts,
        layout=layout,
    )
    programs, state = prepare_model(model, config, shape, layout)

    def step(progress: Progress | None) -> Progress:
        return programs.start(state, request) if progress is None else programs.step(state, request, progress)

    return walk(step, rows, config)


def walk(
    step: Callable[[Progress | None], Progress], rows: int, config: GenerateConfig
) -> Iterator[NewTokens]:
    """Take one step after the other, the first one from None, until all of the first `rows` have ended."""
    live_B = np.ones(rows, bool)
    progress = None
    for _ in range(config.max_new_tokens):
        progress = step(progress)
        # Reading them waits for the step, which also keeps a CPU's simulated devices in step.
        read = jax.device_get((progress.ids_B, progress.log_prob_B, progress.ended_B))
        ids_B, log_prob_B, ended_B = (array[:rows] for array in read)
        yield NewTokens(ids_B, live_B, ended_B, log_prob_B if config.log_probs else None)
        live_B = ~ended_B
        if not live_B.any():
            return


def prepare_model(
    model: TransformerLM, config: GenerateConfig, shape: Shape, layout: Layout | None = None
) -> tuple[Programs, Any]:
    """Give the programs of a model for requests of a shape, and its weights where they want them."""
    graphdef, state = nnx.split(choose_seating(model, config.experts, layout))
    if layout is not None:
        state = place_state(state, layout)
    return compile_programs(graphdef, layout, shape), state


def place_state(state: Any, layout: Layout) -> Any:
    """Put a model's weights where the layout stores them; those that are there already stay as they are."""

    def place(path: tuple[Any, ...], variable: nnx.Variable) -> Any:
        spec = layout.sharding().spec
        if isinstance(variable, nnx.Param):
            spec = stored_as(layout, path, variable[...].ndim)
        return variable.replace(jax.device_put(variable[...], layout.sharding(spec)))

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map_with_path(place, state, is_leaf=is_variable)
