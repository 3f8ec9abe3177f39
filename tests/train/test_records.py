"""The files of a run: rows that survive kills, files replaced at once, folders that can't be written."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from switchmoe.train import RunError, read_rows
from switchmoe.train.collapse import CollapseAlarm, collapsed_layers
from switchmoe.train.display import evaluation_line, line
from switchmoe.train.metrics import MetricsFile
from switchmoe.train.peaks import peak_flops
from switchmoe.train.records import check_writable, prepare_folder, read_json, write_json


def test_rows_after_the_checkpoint_and_a_torn_line_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (3, 6, 9))
    path.write_text(whole + '{"step": 12, "lo')
    assert [row["step"] for row in read_rows(path)] == [3, 6, 9]
    metrics = MetricsFile(path, last_step=6)
    metrics.write({"step": 9, "loss": np.float32(0.25), "grad_norm": math.nan, "load": np.array([0.5, 0.5])})
    metrics.close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"step": 3, "loss": 1.5},
        {"step": 6, "loss": 3.0},
        {"step": 9, "loss": 0.25, "grad_norm": None, "load": [0.5, 0.5]},
    ]


def test_a_process_that_does_not_write_has_the_same_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 6}\n')
    metrics = MetricsFile(path, last_step=3, writes=False)
    metrics.write({"step": 5, "loss": np.float32(0.25)})
    metrics.close()
    assert metrics.rows == [{"step": 3}, {"step": 5, "loss": 0.25}]
    assert [row["step"] for row in read_rows(path)] == [3, 6]


def test_a_row_is_in_the_file_when_write_returns(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    metrics.write({"step": 1})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]
    metrics.close()


def test_a_torn_row_that_is_not_the_last_is_not_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 of .*metrics.jsonl is not JSON"):
        read_rows(tmp_path / "metrics.jsonl")


def test_json_is_replaced_at_once_and_strict(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_json(path, {"loss": math.inf, "steps": np.int64(3)})
    assert json.loads(path.read_text()) == {"loss": None, "steps": 3}

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"steps": 4})
    assert read_json(path) == {"loss": None, "steps": 3}
    assert read_json(tmp_path / "absent.json") is None


def test_a_folder_that_can_not_be_written_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"can't be written \(.*file is a file\); choose another with --out"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(RunError, match="can't be written"):
        prepare_folder(tmp_path / "file" / "run")
    prepare_folder(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # Asked of the system and not tried by chmod, since root, as which CI may run, may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RunError, match="no permission to write"):
        check_writable(tmp_path / "run")


# Shares of the choices of 8 experts in 2 layers, by what is to be noticed.
EVEN = np.full(8, 1 / 8)
ONE = np.array([0.86] + [0.02] * 7)  # one expert has 86% of the tokens
NEARLY_ONE = np.array([0.79] + [0.03] * 7)
IDLE = np.array([1 / 3] * 3 + [0.0] * 5)  # five of eight idle
HALF = np.array([0.25] * 4 + [0.0] * 4)  # four of eight
PAIR = np.array(
    [0.45, 0.45] + [0.1 / 6] * 6
)  # with two choices a token, 90% of the tokens go to the same two


@pytest.mark.parametrize(
    ("loads", "top_k", "choices", "expected"),
    [
        ([EVEN, ONE], 1, 512, [1]),
        ([ONE, IDLE], 1, 512, [0, 1]),
        ([NEARLY_ONE, HALF], 1, 512, []),
        ([IDLE, EVEN], 1, 63, []),  # fewer than 8 choices an expert: idle ones say nothing
        ([PAIR, EVEN], 2, 1024, [0]),
        ([PAIR, EVEN], 1, 512, []),
    ],
)
def test_collapsed_layers(loads, top_k, choices, expected):
    assert collapsed_layers(np.stack(loads), tokens=choices / top_k, choices=choices) == expected


def test_a_choice_that_is_not_used_is_no_sign_of_collapse():
    # Of two choices a token may leave one unused: 512 tokens make 1024 choices in the first layer, 614 in the
    # second. 45% of the choices at one expert are 90% of the tokens there, and 54% here.
    loads = np.array([[0.45] + [0.55 / 7] * 7] * 2)
    assert collapsed_layers(loads, tokens=np.full(2, 512.0), choices=np.array([1024.0, 614.0])) == [0]


def test_a_layer_without_a_choice_can_not_collapse():
    assert collapsed_layers(np.ones((1, 1)), tokens=512, choices=512) == []
    assert collapsed_layers(np.full((1, 2), 0.5), tokens=256, choices=512) == []


def test_the_alarm_rings_once_an_episode_and_remembers_over_a_resume():
    logs = [[], [0], [0], [0, 1], [0, 1], [0], [], [0], [0]]
    alarm = CollapseAlarm()
    heard = [alarm.hear(layers) for layers in logs]
    # Layer 0 for the second time in a row at 2, layer 1 at 4, layer 0 again, after a recovery, at 8.
    assert [i for i, warning in enumerate(heard) if warning] == [2, 4, 8]
    assert "ROUTER COLLAPSE in MoE layer 0:" in heard[2] and "MoE layer 1:" in heard[4]
    for cut in range(len(logs)):
        resumed = CollapseAlarm({"collapsed_layers": layers} for layers in logs[:cut])
        assert [resumed.hear(layers) for layers in logs[cut:]] == heard[cut:]


def test_a_line_shows_drops_beside_their_floor_and_what_is_not_finite():
    row = {"loss": None, "tokens_per_second": 12345.6, "mfu": 0.345, "dropped_fraction": 0.25,
           "dropped_floor": 0.02, "max_vio": 1.5, "balance_loss": 1.0, "skipped": 3}  # fmt: skip
    assert line(row) == (
        "loss not finite  12,346 tokens/s  MFU 34.5%  dropped 25.0% (chance 2.0%)  MaxVio 1.50  3 skipped"
    )
    assert line(row | {"loss": math.nan, "max_vio": math.inf}) == line(row).replace("1.50", "not finite")
    held_out = {"val_loss": math.nan, "val_loss_by_domain": {"prose": None, "verse": math.inf, "code": 2.0}}
    assert evaluation_line(held_out) == ("loss not finite  (prose not finite  verse not finite  code 2.000)")
    dense = {"loss": 2.0, "tokens_per_second": 10.0, "mfu": None, "dropped_floor": 0.0, "skipped": 0}
    assert line(dense) == "loss 2.0000  10 tokens/s"


def test_peaks_are_known_by_device_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("Tesla T4") == 65e12
    assert peak_flops("TPU v6 lite") == peak_flops("TPU v6e") == 918e12
    assert peak_flops("cpu") is None


@pytest.mark.parametrize("kind", ["NVIDIA L40S", "NVIDIA L40", "NVIDIA T400", "NVIDIA A1000"])
def test_a_device_is_not_taken_for_one_whose_name_begins_alike(kind):
    assert peak_flops(kind) is None
