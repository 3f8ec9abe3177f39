"""How many tokens would find no seat by chance alone."""

import functools

import numpy as np


def expected_drop(tokens: int, experts: int, k: int, seats: int) -> float:
    """Count the choices of a group that find no seat when experts are drawn evenly at random.

    This is the floor to hold a measured drop count against; `expected_drop / (tokens * k)` is the fraction.
    """
    return float(expected_drop_table(tokens, experts, k, seats)[tokens])


def expected_drop_table(max_tokens: int, experts: int, k: int, seats: int) -> np.ndarray:
    """Tabulate `expected_drop` for groups of 0, 1, ... `max_tokens` tokens, since padding shortens a group.

    One expert's load X_n after n tokens is binomial with p = k / experts. What it turns away grows by
    p * P(X_n >= seats) with the next token, that tail by p * P(X_n = seats - 1), and that probability by a
    known factor: three sums in float64, without the cancellation of the textbook formula.
    """
    p = k / experts
    n = np.arange(max_tokens)
    if p == 1.0:
        return experts * np.maximum(np.arange(max_tokens + 1.0) - seats, 0.0)
    last = seats - 1
    # log of P(X_(n+1) = last) / P(X_n = last)
    grows = np.log((n + 1.0) / np.maximum(n + 1.0 - last, 1.0)) + np.log1p(-p)
    log_at_n = np.cumsum(np.where(n > last, np.roll(grows, 1), 0.0)) + last * np.log(p)
    last_seat_n = np.where(n >= last, np.exp(log_at_n), 0.0)  # P(X_n = seats - 1)
    full_n = np.concatenate([[0.0], np.cumsum(p * last_seat_n)[:-1]])  # P(X_n >= seats)
    return experts * np.concatenate([[0.0], np.cumsum(p * full_n)])


@functools.lru_cache(maxsize=64)
def padded_drop_table(experts: int, k: int, seats_N: tuple[int, ...]) -> np.ndarray:
    """Tabulate `expected_drop` for groups of 0, 1, ... tokens whose experts have `seats_N` seats each.

    With seats at or above the mean load np it is a sum over loads above the seats; below it is np - seats
    plus a sum over loads under them. Either is of positive terms, of which those next to the seats matter.
    """
    p, n = k / experts, np.arange(len(seats_N))
    seats = np.asarray(seats_N)
    if p == 1.0:
        return experts * np.maximum(n - seats, 0.0)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(n) + 1)))])
    reach = 1 + np.arange(min(len(n), int(60 + 12 * np.sqrt(len(n) * p * (1 - p)))))
    floor_N = np.maximum(n * p - seats, 0.0)
    for some in np.array_split(n, 1 + len(n) * len(reach) // 2**20):  # a few megabytes at a time
        side = np.where(seats[some] >= some * p, 1, -1)[:, None]
        load = seats[some][:, None] + side * reach
        there = (load >= 0) & (load <= some[:, None])
        load = np.where(there, load, 0)
        log_p = log_factorial[some][:, None] - log_factorial[load] - log_factorial[some[:, None] - load]
        log_p += load * np.log(p) + (some[:, None] - load) * np.log1p(-p)
        floor_N[some] += np.sum(np.where(there, np.exp(log_p), 0.0) * reach, axis=1)
    return experts * floor_N
