"""Whole small runs in this process: what they leave, when they stop, what they refuse."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.models import param_count
from switchmoe.train import RunError, load_model, read_rows, run_folder, run_training
from switchmoe.train.config import to_json
from switchmoe.train.display import Display

from .worlds import small_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the sparse model, in which one expert with more than an even share is a collapse."""
    tmp_path = tmp_path_factory.mktemp("finished")
    rows = []
    config = small_config(tmp_path, eval_every=6, moe=dict(balance_coef=0.0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("switchmoe.train.collapse.SHARE_OF_ONE", 0.25)
        result = run_training(config, tmp_path / "runs", display="quiet", on_row=rows.append)
    return config, result, rows, tmp_path


def test_a_run_leaves_what_it_should(finished):
    config, result, rows, tmp_path = finished
    folder = run_folder(config, tmp_path / "runs")
    assert (result.folder, result.status, result.step) == (folder, "done", 12)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "env.json", "metrics.jsonl", "checkpoints", "done.json"}
    assert json.loads((folder / "config.json").read_text()) == to_json(config)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) == [
        "10",
        "12",
    ]
    written = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in written] == [3, 6, 9, 12] == [row["step"] for row in rows]
    assert [row["step"] for row in written if "val_loss" in row] == [6, 12]
    for row in written:
        assert {"loss", "dropped_fraction", "dropped_floor", "max_vio", "tokens_per_second", "learning_rate",
                "grad_norm", "balance_loss", "z_loss", "router_entropy", "dead_experts", "skipped", "flops",
                "seconds"} <= set(row)  # fmt: skip
    assert written[-1]["val_loss"] < written[0]["loss"]
    assert [row["seconds"] for row in written] == sorted(row["seconds"] for row in written)


def test_a_collapsed_router_is_warned_about_once(finished):
    _, _, rows, _ = finished
    assert [row["collapsed_layers"] for row in rows] == [[0]] * 4
    assert ["collapse_warning" in row for row in rows] == [False, True, False, False]
    assert rows[1]["collapse_warning"].startswith("ROUTER COLLAPSE in MoE layer 0:")


def test_a_warning_is_shown_even_when_the_display_is_quiet(capsys):
    Display("quiet", name="run", steps=3, start=0).warn("ROUTER COLLAPSE [0]: raise balance_coef")
    said = capsys.readouterr()
    assert said.out == "" and "ROUTER COLLAPSE [0]: raise balance_coef" in said.err


def test_done_json_closes_the_run(finished):
    config, result, rows, _ = finished
    done = json.loads((result.folder / "done.json").read_text())
    assert done == result.summary
    assert done["steps"] == 12 and done["tokens"] == 12 * 4 * 32
    assert (done["params_total"], done["params_active"]) == param_count(config.model)
    assert set(done["val_loss_by_domain"]) == {"colours", "numbers"}
    assert done["val_loss"] == rows[-1]["val_loss"]
    assert done["flops_per_token"] < done["flops_per_token_executed"]
    assert done["max_vio"] == pytest.approx(np.mean([row["max_vio"] for row in rows]))
    assert done["compile_seconds"] > 0 and done["seconds"] > 0


def test_a_finished_run_is_only_reported(finished, capsys):
    config, result, _, tmp_path = finished
    again = run_training(config, tmp_path / "runs")
    assert (again.status, again.summary) == ("already done", result.summary)
    assert "is already done: validation loss" in capsys.readouterr().out


def test_the_trained_model_can_be_loaded(finished):
    config, result, rows, _ = finished
    model, saved = load_model(result.folder)
    assert saved == config
    logits, aux = model(jnp.full((2, 32), 40))
    assert logits.shape == (2, 32, 259) and aux.load_E.shape == (1, 4)


def test_a_checkpoint_of_another_configuration_is_refused(finished):
    config, result, _, tmp_path = finished
    other = small_config(tmp_path, optimizer=dict(learning_rate=0.5))
    stolen = run_folder(other, tmp_path / "runs")
    stolen.mkdir(parents=True)
    (result.folder / "checkpoints").rename(stolen / "checkpoints")
    try:
        with pytest.raises(RunError, match="optimizer.learning_rate is 0.003 there and 0.5 here") as caught:
            run_training(other, tmp_path / "runs", display="quiet")
        assert caught.value.code == 2 and not (stolen / "config.json").exists()
        (stolen / "config.json").write_text((result.folder / "config.json").read_text())
        with pytest.raises(RunError, match="belongs to another configuration"):
            run_training(other, tmp_path / "runs", display="quiet")
    finally:
        (stolen / "checkpoints").rename(result.folder / "checkpoints")


def test_training_stops_after_too_many_steps_that_are_not_finite(tmp_path):
    config = small_config(
        tmp_path,
        optimizer=dict(learning_rate=1e38, warmup_steps=0, clip_norm=0.0),
        max_bad_steps=2,
        log_every=1,
    )
    with pytest.raises(
        RunError, match="not finite in 2 steps in a row .* lower optimizer.learning_rate"
    ) as caught:
        run_training(config, tmp_path / "runs", display="quiet")
    assert caught.value.code == 3
    rows = read_rows(run_folder(config, tmp_path / "runs") / "metrics.jsonl")
    assert rows[-1]["skipped"] == 2 and rows[-1]["step"] < 12
    assert not (run_folder(config, tmp_path / "runs") / "done.json").exists()


def test_bad_input_leaves_no_run_folder(tmp_path):
    config = small_config(tmp_path)
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tmp_path / "no")))
    big = small_config(tmp_path, batch_size=4000)
    for wrong, sentence in [(missing, "does not exist"), (big, "fewer than a batch of 4000")]:
        with pytest.raises(RunError, match=sentence) as caught:
            run_training(wrong, tmp_path / "runs", display="quiet")
        assert caught.value.code == 2
    assert not (tmp_path / "runs").exists()


def test_the_dense_twin_trains_by_the_same_loop(tmp_path):
    config = small_config(tmp_path, sparse=False, steps=6)
    result = run_training(config, tmp_path / "runs", display="quiet", tensorboard=True)
    assert result.summary["dropped_fraction"] == result.summary["max_vio"] == 0.0
    assert result.summary["params_total"] == result.summary["params_active"]
    assert list((result.folder / "tensorboard").iterdir())
