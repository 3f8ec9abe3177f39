"""The training-step benchmark: its batch, rounds and table, and what it refuses; tests/live runs it whole."""

import contextlib
import io
import re
import sys

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.train_contenders import Settings, make_batch
from benchmarks.train_step import OURS, THEIRS, check_losses, time_rounds
from switchmoe.data import DataConfig
from switchmoe.data import make_batch as next_token_batch
from switchmoe.train import RunError


def test_the_batch_has_whole_rows_in_t5_s_proportions():
    batch = make_batch(Settings())
    assert batch.source_BP.shape == (4, 512) and batch.targets_BS.shape == (4, 114)
    assert batch.weight_BS.all() and batch.mask_BS.all() and batch.source_mask_BP.all()
    np.testing.assert_array_equal(batch.ids_BS[:, 1:], batch.targets_BS[:, :-1])
    assert not batch.ids_BS[:, 0].any() and batch.targets_BS.max() < 32128
    rows = next_token_batch(np.ones((1, 9), np.uint16), np.zeros(1, np.uint8))
    assert batch._fields == rows._fields and DataConfig(sequence_length=512).corruption is None


def test_rounds_are_interleaved_and_the_first_step_is_not_timed():
    order = []
    steps = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    taken = time_rounds(steps, 2)
    assert order == list("ba" + "ab" + "ba")
    assert [len(taken["a"][part]) for part in ("seconds", "cpu_seconds", "losses")] == [2, 2, 3]
    check_losses(taken, ["a", "b"])
    taken["b"]["losses"][0] = 1.001
    with pytest.raises(RunError, match="do not compute the same loss: {'a': 1.0, 'b': 1.001}"):
        check_losses(taken, ["a", "b"])


def test_the_table_compares_with_transformers(capsys):
    row = dict(median_seconds=2.0, median_cpu_seconds=4.0)
    train_step.show([{"name": OURS, **row}, {"name": THEIRS, "median_seconds": 3.0, **row}], Settings())
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "error: (torch|transformers) is not there to compare with; install torch and transformers."),
        (["--layers", "3"], "error: layers is 3 and rounds 5; make layers even"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(monkeypatch, flags, sentence):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags])
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert train_step.main() == 2
    assert re.match(sentence, said.getvalue())
