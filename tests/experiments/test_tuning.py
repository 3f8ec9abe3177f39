"""finetune.py, distill.py and upcycle.py: one small chain through all of them, and what they refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import distill, finetune, upcycle, weights
from switchmoe.interop import to_hf
from switchmoe.train import load_params, run_training
from switchmoe.train.config import from_json
from switchmoe.transfer import params_of, with_params
from tests.quick import compiled_quickly
from tests.train.worlds import small_config
from tests.transfer.worlds import LLAMA, apart, made_up, score


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What is compiled here hardly runs."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A dense run of five steps."""
    place = tmp_path_factory.mktemp("pretrained")
    config = small_config(place, sparse=False, steps=5, eval_batches=1, checkpoint_every=0)
    model = dataclasses.replace(config.model, num_layers=1, moe_every=1)
    config = dataclasses.replace(config, model=model)
    return place, config, run_training(config, place / "runs", display="quiet").folder


def settings_of(folder):
    return from_json(json.loads((folder / "config.json").read_text()))


def test_from_a_dense_run_to_a_sparse_one_to_a_dense_one(pretrained, capsys):
    place, config, dense = pretrained
    out = ["--out", str(place / "runs")]
    assert upcycle.main(["--from", str(dense), "--experts", "2", "--train.steps", "4", *out]) == 0
    (sparse,) = place.glob("runs/test-upcycle-*/0")
    params, made = load_params(sparse)
    assert (made.model.moe.num_experts, made.model.moe.top_k, made.train.steps) == (2, 2, 4)
    assert made.optimizer == config.optimizer and made.data == config.data

    tune = ["--from", str(sparse), "--tune.part", "experts", "--model.moe.expert-dropout", "0.25", *out]
    assert finetune.main(tune) == 0
    (tuned,) = place.glob("runs/test-upcycle-finetune-*/0")
    after, made = load_params(tuned)
    assert made.model.moe.expert_dropout == 0.25 and made.train.steps == 4
    assert made.optimizer.learning_rate == pytest.approx(0.1 * config.optimizer.learning_rate)
    np.testing.assert_array_equal(after["embedding_VD"], params["embedding_VD"])
    moved = [tree["blocks"]["layer_0"]["feed_forward"]["w_in_EDF"] for tree in (params, after)]
    assert 0 < apart(*moved) < 0.1
    assert finetune.main(tune) == 0  # it is done
    assert "is already done" in capsys.readouterr().out

    assert distill.main(["--from", str(tuned), "--width", "24", *out]) == 0
    (student,) = place.glob("runs/test-upcycle-finetune-student-*/0")
    params, made = load_params(student)
    assert made.model == dataclasses.replace(config.model, d_ff_sparse=24)
    assert made.tune.teacher and made.tune.weights and made.tune.soft_share == 0.25
    # After five small steps it is still near to what it copied.
    assert apart(after["embedding_VD"], params["embedding_VD"]) < 0.5


def test_weights_of_others_are_upcycled_to_the_same_function(tmp_path, capsys):
    parent = made_up(LLAMA)
    to_hf(with_params(LLAMA, jax.tree.map(jax.numpy.asarray, parent)), tmp_path / "llama")
    command = ["--from", str(tmp_path / "llama"), "--experts", "3", "--moe-every", "2"]
    assert upcycle.main([*command, "--write", str(tmp_path / "sparse")]) == 0
    model = weights.read_model(tmp_path / "sparse")
    assert (model.config.moe.num_experts, model.config.moe_every) == (3, 2)
    found_BSV, _ = score(model.config, params_of(model))
    assert apart(score(LLAMA, parent)[0], found_BSV) < 1e-5
    assert upcycle.main([*command, "--write", str(tmp_path / "sparse")]) == 2  # it is there already
    other = [*command, "--write", str(tmp_path / "other"), "--model.moe.no-renormalize"]
    assert upcycle.main(other) == 2 and not (tmp_path / "other").exists()
    assert "renormalize is False, but the weights are made for True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (finetune, [], "--from"),
        (finetune, ["--from", "nowhere"], "nowhere has no config.json that can be read; give the folder"),
        (finetune, ["--from", "DENSE", "--tune.part", "experts"], "'experts', but the model is dense"),
        (
            finetune,
            ["--from", "DENSE", "--tune.prat", "all"],
            "no flag --tune.prat; did you mean --tune.part",
        ),
        (finetune, ["--from", "DENSE", "--model.d-ff", "64"], "are not those of the model (blocks.layer_"),
        (distill, ["--from", "DENSE"], "the teacher is dense already"),
        (distill, ["--from", "DENSE", "--student", "DENSE", "--no-copy"], "for a student that is made"),
        (upcycle, ["--from", "DENSE", "--moe-every", "2"], "num_layers=1 is not a multiple of moe_every=2"),
        (upcycle, ["--from", "DENSE", "--how", "copied"], "copied"),
        (upcycle, ["--from", "DENSE", "--expert", "4"], "no flag --expert; did you mean --experts?"),
        (finetune, ["--from", "DENSE", "--model.moe.jitter", "0.1"], "is dense; start from a sparse one"),
        (upcycle, ["--from", "DENSE", "--router", "hash"], "router='hash' has weights that are not known"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    pretrained, capsys, monkeypatch, command, arguments, sentence
):
    place, _, dense = pretrained
    monkeypatch.chdir(place)
    before = sorted(place.glob("**/*"))
    assert command.main([str(dense) if word == "DENSE" else word for word in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and len(said.strip().splitlines()) == 1
    assert sorted(place.glob("**/*")) == before


def test_help_shows_both_kinds_of_flags(pretrained, capsys):
    for arguments, flags in (
        (["--help"], ["--experts", "--write"]),
        (["--from", str(pretrained[2]), "--help"], ["--experts", "--train.steps", "--model.moe.z-coef"]),
    ):
        with pytest.raises(SystemExit) as ended:
            upcycle.main(arguments)
        assert not ended.value.code
        said = capsys.readouterr().out
        assert all(flag in said for flag in ["python experiments/upcycle.py --from DENSE", *flags])
