"""What is written about a logged step, and at the end about the whole run."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from switchmoe.models import flops_per_token, param_count
from switchmoe.train.collapse import collapsed_layers
from switchmoe.train.config import TrainConfig, run_hash
from switchmoe.train.peaks import peak_flops
from switchmoe.train.records import plain

# What differs between two runs of the same configuration; every other field of a row is a function of it.
TIMINGS = ("seconds", "tokens_per_second", "mfu")
# Logged steps whose drops and imbalance are averaged in done.json.
LAST_ROWS = 10


class Costs(NamedTuple):
    """What a run's configuration costs.

    Attributes:
      tokens_per_step: positions of a batch, those that an encoder reads too, padding included.
      flops_per_token: useful training FLOPs, those of the experts a token is sent to.
      flops_per_token_executed: the same with the experts' empty seats.
      params_total, params_active: all parameters, and those a token meets.
    """

    tokens_per_step: int
    flops_per_token: float
    flops_per_token_executed: float
    params_total: int
    params_active: int


def costs(config: TrainConfig) -> Costs:
    """Count what a step of `config` costs."""
    data = config.data
    flops = flops_per_token(config.model, data.target_length, data.source_length)
    return Costs(config.train.batch_size * data.tokens_per_row, *flops, *param_count(config.model))


class Clock:
    """Seconds spent training, over all starts of a run; compiling and evaluating don't count."""

    def __init__(self, seconds: float = 0.0, compile_seconds: float = 0.0) -> None:
        self.seconds, self.compile_seconds = seconds, compile_seconds
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Count the time since the last mark as training, and return it."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.seconds += passed
        return passed

    def skip(self) -> float:
        """Leave the time since the last mark out, and return it."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        return passed

    def saved(self) -> dict[str, float]:
        """What a checkpoint keeps, the time since the last mark included."""
        since = time.perf_counter() - self._mark
        return {"seconds": self.seconds + since, "compile_seconds": self.compile_seconds}


def make_row(
    config: TrainConfig,
    cost: Costs,
    step: int,
    metrics: dict[str, Any],
    *,
    seconds: float,
    steps_timed: int,
    lap: float,
    devices: int = 1,
) -> dict[str, Any]:
    """Make the row of a step from what the step returned.

    `loss` is the cross-entropy of that step's batch in nats a token, without the router losses; router
    metrics are of that batch too. `tokens` and the FLOPs count from the start of the run; `seconds` is
    training time over all starts; `tokens_per_second` and `mfu` (useful FLOPs over the bfloat16 peak of all
    `devices`, None where that isn't known) are of the `steps_timed` steps in the `lap` seconds since the row
    before.
    """
    metrics = dict(metrics)
    load_LE = metrics.pop("load_fraction", None)
    tokens_L, choices_L = (metrics.pop(name, None) for name in ("tokens_routed", "choices"))
    metrics.pop("bad_in_a_row")
    values = {name: np.asarray(value).item() for name, value in metrics.items()}
    tokens = step * cost.tokens_per_step
    rate = steps_timed * cost.tokens_per_step / max(lap, 1e-9)
    peak = peak_flops(jax.devices()[0].device_kind)
    row = {
        "step": step,
        "loss": values.pop("loss"),
        "dropped_fraction": 0.0,
        "dropped_floor": 0.0,
        "max_vio": 0.0,
    }
    row |= values
    row |= {
        "tokens": tokens,
        "flops": tokens * cost.flops_per_token,
        "flops_executed": tokens * cost.flops_per_token_executed,
        "seconds": seconds,
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * cost.flops_per_token / (peak * devices),
    }
    if load_LE is not None:
        row["collapsed_layers"] = collapsed_layers(
            np.asarray(load_LE), tokens=np.asarray(tokens_L), choices=np.asarray(choices_L)
        )
    return row


def summary(
    config: TrainConfig, cost: Costs, rows: list[dict[str, Any]], clock: Clock, environment: dict[str, Any]
) -> dict[str, Any]:
    """Make the content of done.json from the rows of a finished run, as they are read back from JSON.

    Losses are those of the last row; `dropped_fraction`, `dropped_floor` and `max_vio` are means over the
    last ten rows, in training; the same names with `val_` are over held-out text. `tokens_per_second` is
    over all of `seconds`. What was not finite is None there and here.
    """
    last = rows[-1]
    recent = rows[-LAST_ROWS:]
    seconds = max(clock.seconds, 1e-9)
    done = {
        "name": config.name,
        "hash": run_hash(config),
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": last["tokens"],
        "loss": last["loss"],
        "val_loss": last["val_loss"],
        "val_loss_by_domain": last["val_loss_by_domain"],
        **cost._asdict(),
        "tokens_per_second": last["tokens"] / seconds,
        "seconds": clock.seconds,
        "compile_seconds": clock.compile_seconds,
    }
    done.pop("tokens_per_step")
    for name in ("dropped_fraction", "dropped_floor", "max_vio"):
        done[name] = float(np.mean(np.array([row[name] for row in recent], float)))  # None becomes NaN
        done[f"val_{name}"] = last[f"val_{name}"]
    done["skipped"] = last["skipped"]
    return plain(
        done | {name: environment[name] for name in ("text_fingerprint", "device", "device_count", "commit")}
    )
