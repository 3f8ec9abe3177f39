"""The learning rate over a run."""

import jax.numpy as jnp
import optax

from switchmoe.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Say how far each update of a run of `steps` goes: linear warm-up to the peak, then the schedule.

    The returned function takes the number of updates made so far. With W warm-up steps the first update has
    peak / W and update W (counted from 1) the peak. After that, n updates later:

    - "constant": the peak.
    - "cosine": final + (peak - final) * (1 + cos(pi * n / (steps - W))) / 2, so the last update has
      final = peak * final_fraction (Loshchilov & Hutter 2017, equation 5, https://arxiv.org/abs/1608.03983).
    - "inverse_sqrt": peak * sqrt(W / (W + n)) (Raffel et al. 2020, section 3.1.2,
      https://arxiv.org/abs/1910.10683, whose schedule stays flat where this one warms up).
    """
    peak, warmup = config.learning_rate, max(1, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    else:
        after = lambda count: peak * jnp.sqrt(warmup / (warmup + count))  # noqa: E731
    if warmup == 1:
        return after
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rising, after], [warmup - 1])
