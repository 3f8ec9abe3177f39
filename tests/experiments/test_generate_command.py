"""The command that continues texts: what it prints, from which folders, and what it refuses."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import pytest

from experiments import generate as command
from switchmoe.data import ByteTokenizer
from switchmoe.infer import GenerateConfig, generate
from switchmoe.interop import from_hf, save_weights
from switchmoe.models import LMConfig
from tests.infer.worlds import random_model

BYTES = LMConfig(vocab_size=259, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=24)
LLAMA = Path(__file__).parents[1] / "interop" / "recorded" / "llama"
PROMPTS = ("And it came", "Y dijo Jehová")


def ask(folder, *prompts, **options):
    return command.main(command.Arguments(Path(folder), prompts, **(dict(max_new_tokens=6) | options)))


def test_bytes_all_at_once_and_as_they_come(tmp_path, capsys):
    model = random_model(BYTES)
    save_weights(model, tmp_path / "bytes")
    config = GenerateConfig(max_new_tokens=6, temperature=0.7, stop_tokens=(1,), banned_tokens=(0, 2))
    texts = generate(model, PROMPTS, config, tokenizer=ByteTokenizer(), key=jax.random.key(3)).texts
    assert ask(tmp_path / "bytes", *PROMPTS, seed=3, stream=False) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        repr(prompt + text)[1:-1] for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    assert ask(tmp_path / "bytes", *PROMPTS, seed=3, stream=True) == 0
    streamed = capsys.readouterr().out
    assert streamed == "".join(f"{prompt}{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True))


def test_what_an_encoder_reads_ends_as_in_training():
    both = dataclasses.replace(BYTES, encoder_layers=2, positions="relative")
    for config, end in ((BYTES, []), (both, [1])):
        speaker = command.speak_bytes(jax.eval_shape(lambda config=config: random_model(config)))
        assert speaker.read("ab") == [ord("a") + 3, ord("b") + 3, *end]


def test_token_ids_where_there_is_no_tokenizer(tmp_path, capsys):
    new = generate(from_hf(LLAMA), [[5, 9, 2]], GenerateConfig(max_new_tokens=6)).rows()[0].tolist()
    assert ask(LLAMA, "5, 9 2", temperature=0.0, stream=False) == 0
    assert capsys.readouterr().out == f"5, 9 2{''.join(f' {token}' for token in new)}\n"
    # What ends a row is in the files, and is not said.
    stop = new[3]
    assert stop not in new[:3]
    shutil.copytree(LLAMA, tmp_path / "llama")
    (tmp_path / "llama/generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 1000]}))
    assert ask(tmp_path / "llama", "5 9 2", temperature=0.0, stream=True) == 0
    assert capsys.readouterr().out == f"5 9 2{''.join(f' {token}' for token in new[:3])}\n"


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("once upon", {}, "has no tokenizer.json, so prompts are token ids, but there is 'once upon'"),
        ("", {}, "Prompt 0 is empty"),
        ("61", {}, "Token id 61 lies outside the vocabulary of 61"),
        ("5", dict(top_p=3.0), "top_p is 3.0, but must be above 0 and at most 1"),
        ("5", dict(mesh=command.MeshConfig(expert=2)), "needs 2 devices, but there are 1"),
    ],
)
def test_bad_input_is_one_sentence(capsys, prompt, options, said):
    assert ask(LLAMA, prompt, **options) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and said in error and error.count("\n") == 1


def test_folders_that_do_not_do(tmp_path, capsys, monkeypatch):
    assert ask(tmp_path, "5") == 2
    assert "has no config.json that can be read" in capsys.readouterr().err
    shutil.copytree(LLAMA, tmp_path / "llama")
    (tmp_path / "llama/tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert ask(tmp_path / "llama", "5") == 2
    assert "needs the library tokenizers; pip install 'switchmoe[hf]'" in capsys.readouterr().err
