"""Configurations: what moves a run's hash, that they survive JSON, and what they refuse."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from switchmoe.config import MoEConfig
from switchmoe.data import DataConfig
from switchmoe.models import LMConfig
from switchmoe.train import PRESETS, OptimizerConfig, TrainSettings, preset, run_folder, run_hash
from switchmoe.train.config import ADDED_SETTINGS, TuneConfig, from_json, identity, to_json
from switchmoe.train.rows import costs
from tests.checks import unchecked


def change(config, path, value):
    first, _, rest = path.partition(".")
    part = value if not rest else change(getattr(config, first), rest, value)
    return dataclasses.replace(config, **{first: part})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.moe.num_experts", 16),
        ("model.moe", None),
        ("model.init_scale", 0.5),
        ("data.sequence_length", 64),
        ("data.seed", 1),
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.schedule", "constant"),
        ("train.steps", 300),
        ("train.batch_size", 32),
        ("train.accumulate", 2),
        ("tune.part", "experts"),
        ("tune", TuneConfig(part="lora", lora_rank=2)),
        ("tune.weights", "0123456789abcdef"),
        ("tune.teacher", "0123456789abcdef"),
    ],
)
def test_what_a_run_computes_moves_its_hash(path, value):
    config = preset("tiny")
    assert run_hash(change(config, path, value)) != run_hash(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("data.cache_dir", "/elsewhere"),
        ("train.seed", 3),
        ("train.log_every", 1),
        ("train.eval_every", 7),
        ("train.eval_batches", 1),
        ("train.checkpoint_every", 3),
        ("train.keep_checkpoints", 9),
        ("train.max_bad_steps", 99),
        ("model.rope_theta", 10000),  # 10000 and 10000.0 are one setting
    ],
)
def test_how_a_run_is_launched_and_watched_does_not_move_its_hash(path, value):
    config = preset("tiny")
    assert run_hash(change(config, path, value)) == run_hash(config)


def test_every_field_was_thought_of():
    # A new field counts in the hash unless somebody puts it among the free ones; this list makes them decide.
    assert {field.name for field in dataclasses.fields(TrainSettings)} == {
        "steps", "batch_size", "accumulate", "seed", "log_every", "eval_every", "eval_batches",
        "checkpoint_every", "keep_checkpoints", "max_bad_steps",
    }  # fmt: skip


def test_a_setting_that_came_later_moves_no_older_run():
    # They must be listed with their defaults, and another value must be another run.
    config = preset("tiny")
    assert not set(identity(to_json(config))) & set(ADDED_SETTINGS)
    changed = change(change(config, "model.moe.router", "sigmoid"), "model.moe.weight_scale", 2.5)
    other = change(config, "model.moe.router", "sigmoid")
    assert run_hash(changed) != run_hash(other)
    # Whoever adds a field lists it there, unless it shall make other runs of all old ones.
    first = {
        "model.moe": {
            "d_model", "d_ff", "num_experts", "router", "top_k", "renormalize", "dispatch", "capacity_factor",
            "eval_capacity_factor", "expert_capacity", "sequences_per_group", "drop_order", "activation",
            "gated", "expert_dropout", "jitter", "balance_coef", "z_coef", "init_scale",
        },
        "model": {
            "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "moe",
            "moe_every", "rope_theta", "norm_eps", "activation", "gated", "init_scale", "dropout",
            "tie_embeddings", "dtype", "remat", "attention_implementation", "d_ff_sparse",
            "allow_future_leak",
        },
        "data": {"source", "sequence_length", "validation_fraction", "seed", "cache_dir"},
        "tune": set(),
    }  # fmt: skip
    parts = {"model.moe": MoEConfig, "model": LMConfig, "data": DataConfig, "tune": TuneConfig}
    added = {
        f"{part}.{field.name}"
        for part, of in parts.items()
        for field in dataclasses.fields(of)
        if field.name not in first[part]
    }
    assert added == set(ADDED_SETTINGS)
    # The folders that runs of earlier versions left.
    hashes = dict(tiny="1035cdce", base="4e708631") | {"tiny-dense": "16644b4a", "small": "865ba83e"}
    assert {name: run_hash(preset(name)) for name in hashes} == hashes
    saved = to_json(config)
    for path in ADDED_SETTINGS:
        *parts, name = path.split(".")
        del functools.reduce(dict.__getitem__, parts, saved)[name]
    del saved["tune"]
    assert identity(saved) == identity(to_json(config)) and from_json(saved) == config


def test_a_run_has_a_folder_by_name_hash_and_seed():
    config = change(preset("tiny"), "train.seed", 4)
    assert run_folder(config, "out") == Path("out") / f"tiny-{run_hash(config)}" / "4"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = preset(name)
    assert config.name == name
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("-dense")])
def test_a_preset_has_a_dense_twin_at_equal_flops(name):
    sparse, dense = preset(name), preset(f"{name}-dense")
    assert sparse.model.moe is not None and dense.model.moe is None
    assert (sparse.data, sparse.optimizer, sparse.train) == (dense.data, dense.optimizer, dense.train)
    useful = [costs(run).flops_per_token for run in (dense, sparse)]
    assert useful[0] == pytest.approx(useful[1], rel=0.05)


@pytest.mark.parametrize("name", ["tiny", "tiny-switch"])
def test_tiny_divides_by_eight(name):
    tiny = preset(name)
    rows = tiny.train.batch_size // tiny.model.moe.sequences_per_group
    assert rows % 8 == 0 and tiny.model.moe.num_experts % 8 == 0


def test_how_spans_are_cut_moves_the_hash():
    config = preset("tiny-switch")
    changes = {"data.noise_density": 0.3, "data.mean_span": 20.0, "model.encoder_layers": 4}
    assert len({run_hash(config), *(run_hash(change(config, *item)) for item in changes.items())}) == 4


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: preset("tinny"), "no preset 'tinny'; did you mean 'tiny'"),
        (lambda: TrainSettings(steps=0), "train.steps is 0, but must be at least 1"),
        (lambda: TrainSettings(seed=2**32), "must be below 2"),
        (
            lambda: TrainSettings(batch_size=6, accumulate=4),
            "batch_size=6 does not split into train.accumulate=4",
        ),
        (lambda: OptimizerConfig(name="adam"), "optimizer.name='adam' is not known; did you mean 'adamw'"),
        (lambda: OptimizerConfig(schedule="cosin"), "did you mean 'cosine'"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2 is 1.0, but must be in \[0, 1\)"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: OptimizerConfig(final_fraction=2.0), "final_fraction is 2.0"),
        (lambda: OptimizerConfig(epsilon=0.0), "epsilon is 0.0"),
        (lambda: TuneConfig(part="expert"), "tune.part='expert' is not known; did you mean 'experts'"),
        (lambda: TuneConfig(part="lora", lora_rank=0), "lora_rank is 0, but must be at least 1"),
        (lambda: TuneConfig(part="lora", lora_alpha=0.0), "lora_alpha is 0.0"),
        (lambda: TuneConfig(soft_share=1.5), r"soft_share is 1.5, but must be in \[0, 1\]"),
        (lambda: TuneConfig(lora_rank=4), "are of adapters, but tune.part is 'all'"),
        (lambda: change(preset("tiny-dense"), "tune.part", "rest"), "'rest', but the model is dense"),
        (lambda: change(preset("tiny"), "name", "a/b"), "names a folder"),
        (lambda: change(preset("tiny"), "model.vocab_size", 258), "the byte tokenizer has 259 tokens;"),
        (
            lambda: change(preset("tiny-switch"), "model.vocab_size", 383),
            "model.vocab_size is 383, but the byte tokenizer has 384 tokens and sentinels; raise",
        ),
        (
            lambda: change(
                change(preset("tiny"), "model.vocab_size", 384), "data.objective", "span_corruption"
            ),
            "encoder_layers is 0, but data.objective is .span_corruption.; .span_corruption. is for an",
        ),
        (
            lambda: change(preset("tiny-switch"), "data.objective", "next_token"),
            "encoder_layers is 2, but data.objective is .next_token.; .* change one of them",
        ),
        (lambda: change(preset("tiny"), "model.moe.sequences_per_group", 3), "16 rows .* does not divide"),
        (
            lambda: change(change(preset("tiny"), "model.moe.sequences_per_group", 4), "train.accumulate", 8),
            "a micro-batch has 2 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(build, sentence):
    with unchecked(), pytest.raises(ValueError, match=sentence):
        build()
