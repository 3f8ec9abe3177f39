"""How many seats an expert has for the tokens of a group."""

import functools
import math
from fractions import Fraction

from switchmoe.config import MoEConfig


def capacity(tokens: int, experts: int, k: int, factor: float, multiple_of: int = 1) -> int:
    """Count the seats an expert has for the tokens of one group.

    ceil(factor * tokens * k / experts), then up to the next multiple of `multiple_of`, then at most
    `tokens`, since no expert is offered a token twice. `factor` is read as the decimal it is written as, so
    that 1.1 * 10 is 11 and not the 12 of binary rounding.

    Source: Switch Transformers, equation 3, https://arxiv.org/abs/2101.03961; k counts, as in GShard.
    """
    if not factor > 0:
        raise ValueError(f"The capacity factor is {factor}, but must be above 0.")
    seats = math.ceil(Fraction(repr(float(factor))) * tokens * k / experts)
    return min(tokens, math.ceil(seats / multiple_of) * multiple_of)


def expert_seats(config: MoEConfig, *, tokens: int, train: bool) -> int:
    """Count the seats of an expert in a group of `tokens`, as the config wants them.

    That is where experts have seats: not with dropless dispatch, nor for Soft MoE, whose
    `config.slots_per_expert` mixtures do not depend on the tokens.
    """
    if config.expert_capacity is not None:
        return min(config.expert_capacity, tokens)
    factor = config.capacity_factor if train else config.eval_capacity_factor
    return capacity(tokens, config.num_experts, config.top_k, factor)


@functools.lru_cache(maxsize=64)
def seats_by_tokens(config: MoEConfig, *, tokens: int, train: bool) -> tuple[int, ...] | None:
    """Count an expert's seats in groups with 0, 1, ... `tokens` real tokens, the others being padding.

    Outside training padding brings no seats, so that a row's tokens are dropped or not whatever it is padded
    to. None where seats do not depend on that: in training, where a padded row is as good as a full one, with
    an absolute capacity, and without seats.
    """
    if train or config.expert_capacity is not None or config.dispatch == "dropless":
        return None
    seats = (
        capacity(n, config.num_experts, config.top_k, config.eval_capacity_factor)
        for n in range(1, tokens + 1)
    )
    return (0, *seats)
