"""Named runs: each a function that returns a TrainConfig, and a dense twin of each at equal FLOPs."""

import dataclasses
from collections.abc import Callable

from switchmoe.config import did_you_mean
from switchmoe.data import DataConfig
from switchmoe.models import base_lm, dense_twin, small_lm, tiny_lm
from switchmoe.train.config import OptimizerConfig, TrainConfig, TrainSettings


def tiny() -> TrainConfig:
    """Two layers of 64 features, 8 experts, 200 steps of 16 rows of 128 bytes: a minute on two CPU cores."""
    return TrainConfig(
        name="tiny",
        model=tiny_lm(),
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainSettings(steps=200, batch_size=16, eval_every=100, eval_batches=16, checkpoint_every=100),
    )


def small() -> TrainConfig:
    """Four layers of 256 features, 8 experts, 2,000 steps of 32 rows of 256 bytes: minutes on a GPU."""
    return TrainConfig(
        name="small",
        model=small_lm(),
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainSettings(steps=2000, batch_size=32, eval_every=250, eval_batches=16, checkpoint_every=250),
    )


def base() -> TrainConfig:
    """A decoder of Switch-Base's sizes, 64 experts, 10,000 steps of 64 rows of 512 bytes: hours on a GPU."""
    return TrainConfig(
        name="base",
        model=base_lm(),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000),
        train=TrainSettings(
            steps=10_000, batch_size=64, log_every=50, eval_every=1000, eval_batches=16, checkpoint_every=1000
        ),
    )


def dense(sparse: TrainConfig) -> TrainConfig:
    """The same run with the FLOP-matched dense twin in place of the sparse model."""
    twin = dense_twin(sparse.model, sparse.data.sequence_length)
    return dataclasses.replace(sparse, name=f"{sparse.name}-dense", model=twin)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "tiny-dense": lambda: dense(tiny()),
    "small-dense": lambda: dense(small()),
    "base-dense": lambda: dense(base()),
}


def preset(name: str) -> TrainConfig:
    """The run called `name`.

    Raises:
      ValueError: there is none; the sentence names the nearest.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}.")
    return PRESETS[name]()
