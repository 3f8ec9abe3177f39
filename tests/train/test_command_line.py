"""The command line: flags reach the configuration, and every mistake is one sentence without a traceback."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from experiments.pretrain import main
from switchmoe.parallel import MeshConfig
from switchmoe.parallel.processes import LaunchConfig
from switchmoe.train import preset
from switchmoe.train.command_line import parse
from tests.checks import unchecked


def test_flags_change_a_preset():
    line = parse(
        [
            "tiny",
            "--train.steps",
            "20",
            "--model.moe.num-experts",
            "16",
            "--out",
            "DIR",
            "--train.log-every=5",
        ],
        "pretrain.py",
    )
    assert line.out == "DIR" and not line.wandb
    assert (line.config.train.steps, line.config.train.log_every) == (20, 5)
    assert line.config.model.moe.num_experts == 16
    assert line.config.data == preset("tiny").data


def test_mesh_and_launch_are_flags_but_no_part_of_what_is_trained():
    line = parse(
        ["tiny", "--mesh.data", "-1", "--mesh.expert", "4", "--mesh.executor", "all_gather"]
        + ["--mesh.ragged-buffer-factor", "1.5", "--launch.coordinator", "here:1234"]
        + ["--launch.lost-seconds", "20"],
        "pretrain.py",
    )
    assert line.mesh == MeshConfig(expert=4, executor="all_gather", ragged_buffer_factor=1.5)
    assert line.launch == LaunchConfig(coordinator="here:1234", lost_seconds=20)
    assert line.config == preset("tiny")
    assert parse(["tiny"], "pretrain.py").mesh == MeshConfig()


def test_reading_a_command_line_touches_no_device():
    code = """
        from jax._src import xla_bridge
        from switchmoe.train.command_line import parse
        from switchmoe.train import PRESETS
        import experiments.pretrain
        for name in PRESETS:
            parse([name, "--mesh.expert", "2"], "pretrain.py")
        assert not xla_bridge.backends_are_initialized(), "processes can't be joined any more"
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr.decode()


def test_a_preset_alone_is_itself():
    for name in ("tiny", "base-dense"):
        assert parse([name], "pretrain.py").config == preset(name)


MISTAKES = [
    (["tinny"], "there is no preset 'tinny'; did you mean 'tiny'"),
    (["--out", "x"], "the first argument must be a preset, one of tiny, small"),
    ([], "the first argument must be a preset"),
    (["tiny", "--train.step", "3"], "there is no flag --train.step; did you mean --train.steps?"),
    (["tiny", "--train.log_evry", "3"], "there is no flag --train.log-evry; did you mean --train.log-every?"),
    (["tiny", "--num-experts", "3"], "did you mean --model.moe.num-experts?"),
    (["tiny", "3"], "the argument '3' belongs to no flag"),
    (["tiny", "--train.steps", "many"], "Error parsing --train.steps: invalid literal for int()"),
    (["tiny", "--train.steps", "0"], "train.steps is 0, but must be at least 1"),
    (["tiny", "--model.moe.router", "swich"], "router='swich' is not known; did you mean 'switch'"),
    (["tiny", "--model.moe.router", "top_k", "--model.moe.top-k", "9"], "num_experts=8 is less than top_k=9"),
    (["tiny", "--model.moe.capacity-factor", "0"], "capacity_factor is 0.0, but must be"),
    (["tiny", "--model.moe.renormalize"], "renormalize=True with top_k=1"),
    (["tiny", "--model.num-layers", "3"], "num_layers=3 is not a multiple of moe_every=2"),
    (["tiny", "--model.moe.sequences-per-group", "3"], "sequences_per_group=3 does not divide"),
    (["tiny", "--model.vocab-size", "100"], "model.vocab_size is 100"),
    (["tiny", "--model.activation", "rel"], "invalid choice 'rel' for argument '--model.activation'"),
    (["tiny-dense", "--model.moe.num-experts", "4"], "is for sparse models, but 'tiny-dense' is dense"),
    (["tiny", "--data.source", "/no/such/folder"], "folder /no/such/folder does not exist"),
    (["tiny", "--mesh.experts", "2"], "there is no flag --mesh.experts; did you mean --mesh.expert?"),
    (["tiny", "--mesh.executor", "all_to_al"], "invalid choice 'all_to_al'"),
    (["tiny", "--mesh.data", "-1", "--mesh.fsdp", "-1"], "mesh.data and mesh.fsdp are -1, but only one axis"),
    (["tiny", "--mesh.expert", "2"], "needs 2 devices, but there are 1"),
    (["tiny", "--launch.coordinator", "here"], "launch.coordinator must be HOST:PORT"),
    (["tiny", "--launch.num-processes", "2"], "need --launch.coordinator and --launch.process-id too"),
    (["tiny", "--wandb"], "--wandb needs the package wandb"),
    (["tiny", "--out", __file__], "can't be written"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--wandb" in arguments:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with unchecked():
        assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sentence in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "shown"), [(["--help"], "small-dense"), (["tiny", "--help"], "--train.steps")]
)
def test_help_is_there(arguments, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0 and shown in capsys.readouterr().out
