"""A corpus and models small enough to train in a test."""

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np

from switchmoe.config import MoEConfig
from switchmoe.data import DataConfig
from switchmoe.models import LMConfig
from switchmoe.train import OptimizerConfig, TrainConfig, TrainSettings
from switchmoe.train.model import pure_model
from switchmoe.train.step import TrainState, init_state

WORDS = {
    "colours": "red green blue white black grey pink".split(),
    "numbers": "one two three four five six seven".split(),
}


def write_corpus(folder: Path, words: int = 1500) -> Path:
    """Write two domains of random words, the same every time."""
    folder.mkdir(parents=True)
    for domain, vocabulary in WORDS.items():
        text = " ".join(random.Random(domain).choices(vocabulary, k=words))
        (folder / f"{domain}.txt").write_text(text, encoding="utf-8")
    return folder


def small_model(sparse: bool = True, **moe) -> LMConfig:
    """Two layers of 32 features; the second one has 4 experts unless `sparse` is False."""
    wanted = dict(d_model=32, d_ff=32, num_experts=4, drop_order="token", sequences_per_group=2) | moe
    config = MoEConfig(**wanted) if sparse else None
    return LMConfig(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=32, moe=config)


def small_config(tmp_path: Path, sparse: bool = True, moe=None, optimizer=None, **settings) -> TrainConfig:
    """A run of the small model on the small corpus, which is written if it isn't there."""
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    wanted = dict(steps=12, batch_size=4, log_every=3, eval_batches=2, checkpoint_every=5) | settings
    return TrainConfig(
        name="test",
        model=small_model(sparse, **(moe or {})),
        data=DataConfig(source=str(corpus), sequence_length=32, cache_dir=str(tmp_path / "cache")),
        optimizer=OptimizerConfig(**(dict(warmup_steps=2) | (optimizer or {}))),
        train=TrainSettings(**wanted),
    )


def spans_config(tmp_path: Path, sparse: bool = True, moe=None, optimizer=None, **settings) -> TrainConfig:
    """The same run with an encoder and a decoder of one layer each, sparse, that fill in spans."""
    config = small_config(tmp_path, sparse, moe, optimizer, **settings)
    model = dataclasses.replace(
        config.model,
        vocab_size=384,
        num_layers=1,
        encoder_layers=1,
        moe_every=1,
        positions="relative",
        scale_scores=False,
    )
    data = dataclasses.replace(config.data, objective="span_corruption", sequence_length=64)
    return dataclasses.replace(config, model=model, data=data)


def made_up_state(config: TrainConfig) -> TrainState:
    """A state of the right shapes at step 0, since drawing its weights would have to be compiled."""

    def fill(path, shape):
        if path[0].name != "params":
            return np.zeros(shape.shape, shape.dtype)
        return np.random.default_rng(shape.size).normal(0, 0.2, shape.shape).astype(np.float32)

    return jax.tree.map_with_path(fill, jax.eval_shape(lambda: init_state(config, pure_model(config.model))))


def flags(tmp_path: Path) -> list[str]:
    """The command line of a run of the small model, with jitter, so that a wrong key shows, and a bias."""
    wanted = {
        "model.d-model": 32,
        "model.d-ff": 32,
        "model.num-heads": 2,
        "model.num-kv-heads": 1,
        "model.moe.d-model": 32,
        "model.moe.d-ff": 32,
        "model.moe.num-experts": 4,
        "model.moe.jitter": 0.01,
        "model.moe.bias-step": 0.001,
        "data.source": write_corpus(tmp_path / "corpus"),
        "data.sequence-length": 32,
        "data.cache-dir": tmp_path / "cache",
        "train.steps": 24,
        "train.batch-size": 4,
        "train.log-every": 3,
        "train.eval-every": 8,
        "train.eval-batches": 2,
        "train.checkpoint-every": 5,
    }
    return ["tiny", *(word for name, value in wanted.items() for word in (f"--{name}", str(value)))]
