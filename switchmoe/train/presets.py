"""Named runs: each a function that returns a TrainConfig, and a dense twin of each at equal FLOPs."""

import dataclasses
from collections.abc import Callable

from switchmoe.config import did_you_mean
from switchmoe.data import DataConfig
from switchmoe.models import (
    base_lm,
    dense_twin,
    small_lm,
    small_switch,
    switch_base,
    tiny_lm,
    tiny_switch,
)
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


def tiny_spans() -> TrainConfig:
    """An encoder and a decoder like tiny's that fill in spans, 160 bytes a row: a minute on two CPU cores."""
    # Two rows are a group, since a row's 37 targets alone would be too few for 8 experts.
    model = tiny_switch()
    assert model.moe is not None
    moe = dataclasses.replace(model.moe, sequences_per_group=2)
    return dataclasses.replace(
        tiny(),
        name="tiny-switch",
        model=dataclasses.replace(model, moe=moe),
        data=DataConfig(sequence_length=160, objective="span_corruption"),
    )


def small_spans() -> TrainConfig:
    """An encoder and a decoder like small's that fill in spans, 256 bytes a row: minutes on a GPU."""
    model = small_switch()
    assert model.moe is not None
    moe = dataclasses.replace(model.moe, sequences_per_group=2)
    return dataclasses.replace(
        small(),
        name="small-switch",
        model=dataclasses.replace(model, moe=moe),
        data=DataConfig(sequence_length=256, objective="span_corruption"),
    )


def switch_base_8() -> TrainConfig:
    """Switch-Base with 8 experts, on bytes, 512 a row of 64, for 10,000 steps: hours on a GPU."""
    return dataclasses.replace(
        base(),
        name="switch-base-8",
        model=dataclasses.replace(switch_base(8), vocab_size=384),
        data=DataConfig(sequence_length=512, objective="span_corruption"),
    )


def dense(sparse: TrainConfig) -> TrainConfig:
    """The same run with the FLOP-matched dense twin in place of the sparse model."""
    twin = dense_twin(sparse.model, sparse.data.target_length, sparse.data.source_length)
    return dataclasses.replace(sparse, name=f"{sparse.name}-dense", model=twin)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "tiny-dense": lambda: dense(tiny()),
    "small-dense": lambda: dense(small()),
    "base-dense": lambda: dense(base()),
    "tiny-switch": tiny_spans,
    "small-switch": small_spans,
    "switch-base-8": switch_base_8,
    "tiny-switch-dense": lambda: dense(tiny_spans()),
    "small-switch-dense": lambda: dense(small_spans()),
    "switch-base-8-dense": lambda: dense(switch_base_8()),
}


def preset(name: str) -> TrainConfig:
    """The run called `name`.

    Raises:
      ValueError: there is none; the sentence names the nearest.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}.")
    return PRESETS[name]()
