"""An encoder and a decoder that learn to fill in spans: they learn, resume exactly, and are reported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.data import batches, evaluation_batches, load_packed
from switchmoe.models import param_count
from switchmoe.report.__main__ import main as report
from switchmoe.train import load_model, load_params, read_rows, run_training
from switchmoe.train.rows import TIMINGS
from tests.train.worlds import spans_config

STEPS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """With dropout of experts and a bias, so that a wrong key or a state that is lost shows."""
    return spans_config(
        tmp_path_factory.mktemp("spans"),
        moe=dict(expert_dropout=0.1, bias_step=0.001, init_scale=1.0),
        optimizer=dict(learning_rate=1e-2),
        steps=STEPS,
        batch_size=16,
        log_every=20,
        checkpoint_every=50,
        keep_checkpoints=3,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return run_training(config, tmp_path_factory.mktemp("out"), display="quiet")


def held_out(config, corpus):
    return evaluation_batches(
        corpus.validation, config.train.micro_batch_size, corruption=config.data.corruption
    )


def unigram(config):
    """Nats a target token for somebody who knows how often each one is, and nothing else."""
    corpus = load_packed(config.data)
    seen = batches(corpus.train, 64, seed=1, corruption=config.data.corruption)[0]
    counts = np.bincount(seen.targets_BS[seen.mask_BS], minlength=config.model.vocab_size) + 1e-2
    nats = -np.log(counts / counts.sum())
    targets = [batch.targets_BS[batch.mask_BS] for batch in held_out(config, corpus)]
    return nats[np.concatenate(targets)].mean()


def test_it_learns_more_than_how_often_a_byte_is(config, finished):
    done = finished.summary
    assert done["val_loss"] < unigram(config) - 0.5, done["val_loss"]
    assert set(done["val_loss_by_domain"]) == {"colours", "numbers"}
    # 64 source tokens come from 70: 10 of noise (10.5, half to even) in 3 spans, and an end token.
    assert done["tokens"] == STEPS * 16 * (64 + 10 + 3 + 1)
    assert (done["params_total"], done["params_active"]) == param_count(config.model)
    assert 0 < done["flops_per_token"] < done["flops_per_token_executed"]
    rows = read_rows(finished.folder / "metrics.jsonl")
    # Both stacks have a sparse layer; the encoder's is the first.
    assert np.shape(rows[-1]["val_load_fraction"]) == (2, 4)
    assert not rows[-1]["skipped"]


def test_a_run_goes_on_as_if_it_had_never_stopped(config, finished, tmp_path):
    # What a run leaves that is killed behind step 50 and before 100; test_killed.py kills real ones.
    folder = tmp_path / finished.folder.parent.name / finished.folder.name
    shutil.copytree(finished.folder, folder)
    (folder / "done.json").unlink()
    for step in (100, STEPS):
        shutil.rmtree(folder / "checkpoints" / str(step))
    again = run_training(config, tmp_path, display="quiet")
    assert again.folder == folder and json.loads((folder / "env.json").read_text())["start_step"] == 50
    one, other = (load_params(result.folder)[0] for result in (finished, again))
    assert (
        "cross_attention" in one["blocks"]["layer_0"] and "attention" in one["encoder"]["blocks"]["layer_0"]
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    rows = [read_rows(result.folder / "metrics.jsonl") for result in (finished, again)]
    for mine, theirs in zip(*rows, strict=True):
        for name in mine.keys() - set(TIMINGS):
            wanted = mine[name]
            if name in ("val_loss", "val_loss_by_domain"):  # see test_killed.py
                wanted = pytest.approx(wanted, rel=1e-6)
            assert theirs[name] == wanted, name


def test_it_is_reported_and_loaded(config, finished, capsys):
    assert report([str(finished.folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    model, loaded = load_model(finished.folder)
    assert loaded == config
    # The last rows are empty: they fill the batch up, and give no number that is none.
    batch = jax.tree.map(jnp.asarray, list(held_out(config, load_packed(config.data)))[-1])
    assert not batch.source_mask_BP[-1].any()
    logits_BSV, aux = model(batch.ids_BS, source_BP=batch.source_BP, source_mask_BP=batch.source_mask_BP)
    assert logits_BSV.shape == (*batch.ids_BS.shape, 384) and jnp.isfinite(logits_BSV).all()
    assert aux.load_E.shape == (2, 4)
