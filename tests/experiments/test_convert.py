"""convert.py: from every form into every other, and a sentence and exit code 2 where that can't be."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from experiments import convert, weights
from switchmoe.config import MoEConfig
from switchmoe.interop import from_hf, save_weights
from switchmoe.models import LMConfig, with_moe
from tests.interop.worlds import RECORDED, copy_of, model_of, random_model, same_weights

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_there_and_back_with_tokens(tmp_path):
    source = copy_of("mixtral", tmp_path / "source", eos_token_id=2, max_position_embeddings=99)
    (source / "tokenizer.json").write_text("{}")
    assert run(source, tmp_path / "own", "--to", "switchmoe") == 0
    same_weights(weights.read_model(tmp_path / "own"), from_hf(source))
    assert run(tmp_path / "own", tmp_path / "hf", "--to", "hf", "--tokens-from", source) == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["max_position_embeddings"]) == (2, 99)
    assert (tmp_path / "own" / "tokenizer.json").is_file() and (tmp_path / "hf" / "tokenizer.json").is_file()


def test_the_tokenizer_of_what_is_replaced_stays(tmp_path):
    out = copy_of("llama", tmp_path / "out")
    (out / "tokenizer.json").write_text("{}")
    options = ("--to", "hf", "--tokens-from", out, "--overwrite")
    assert run(RECORDED / "mixtral", out, *options) == 0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert from_hf(out).config.moe is not None


def test_types_and_shards(tmp_path):
    options = ("--to", "hf", "--dtype", "bfloat16", "--stacked", "--max-shard-gb", "0.00001")
    assert run(RECORDED / "olmoe", tmp_path / "out", *options) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    narrow, wanted = from_hf(tmp_path / "out"), from_hf(RECORDED / "olmoe", dtype="bfloat16")
    assert narrow.config == wanted.config
    expert = wanted.blocks.layer_0.feed_forward.w_gate_EDF[...]
    np.testing.assert_array_equal(narrow.blocks.layer_0.feed_forward.w_gate_EDF[...], expert)


def test_t5x(tmp_path):
    assert run(RECORDED / "switch", tmp_path / "t5x", "--to", "t5x") == 0
    with np.load(tmp_path / "t5x" / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["encoder/layers_1/mlp/expert/wi/kernel"].shape == (4, 16, 12)
    assert run(tmp_path / "t5x", tmp_path / "hf", "--to", "hf") == 0
    same_weights(from_hf(tmp_path / "hf"), model_of("switch"))


def test_a_run(tmp_path, monkeypatch, capsys):
    # A run has a capacity factor, transformers a number of seats. (Reading runs is tested with them.)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": {}, "train": {}}))
    trained = model_of("switch")
    factors = with_moe(
        trained, dataclasses.replace(trained.config.moe, expert_capacity=None, sequences_per_group=2)
    )
    monkeypatch.setattr(weights, "load_model", lambda _: (factors, None))
    assert run(folder, tmp_path / "out", "--to", "hf") == 2
    assert "moe.sequences_per_group=2" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--to", "hf", "--expert-capacity", 2) == 0
    same_weights(from_hf(tmp_path / "out"), trained)


def test_sentences(tmp_path, capsys):
    def refusal(*arguments):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "out"
    assert "has no config.json" in refusal(tmp_path, out, "--to", "hf")
    (tmp_path / "config.json").write_text("{}")
    assert "is neither a run's nor one of" in refusal(tmp_path, out, "--to", "hf")
    mixtral = RECORDED / "mixtral"
    assert "is what is read" in refusal(mixtral, mixtral, "--to", "hf", "--overwrite")
    assert "no encoder" in refusal(mixtral, out, "--to", "t5x")
    assert "nowhere is no folder" in refusal(
        mixtral, out, "--to", "hf", "--tokens-from", tmp_path / "nowhere"
    )
    assert "no folder can be made" in refusal(mixtral, tmp_path / "config.json" / "out", "--to", "hf")
    assert "--expert-capacity is for sparse" in refusal(
        RECORDED / "llama", out, "--to", "hf", "--expert-capacity", 3
    )
    assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("x")
    assert "is not empty" in refusal(mixtral, out, "--to", "hf")
    # A model of ours that transformers has not, as the quickstart's.
    causal = LMConfig(vocab_size=11, d_model=8, moe=MoEConfig(d_model=8, num_experts=2))
    save_weights(random_model(causal), tmp_path / "ours")
    assert "moe.router='switch' where they have 'top_k'" in refusal(tmp_path / "ours", out, "--to", "hf")


def test_as_a_command(tmp_path):
    command = [sys.executable, "experiments/convert.py", str(RECORDED / "llama"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--to", "switchmoe"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"wrote {tmp_path / 'out'}"
