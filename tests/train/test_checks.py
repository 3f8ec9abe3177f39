"""What a run refuses or warns of before it trains, and signals that come when it has nearly ended."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from switchmoe.data import PackedCorpus, Rows, SpecialTokens, load_packed
from switchmoe.dispatching import expected_drop
from switchmoe.parallel import MeshConfig, make_layout
from switchmoe.parallel.processes import ClusterError
from switchmoe.train import RunError, RunResult, read_rows, run_folder, run_training, running
from switchmoe.train.checks import check_vocabulary, no_room_warning, small_groups_warning
from switchmoe.train.display import Display
from switchmoe.train.records import read_json, write_json

from .worlds import small_config, spans_config

OTHER_TEXT = "is not the one this run was trained on; use another --out or restore the text."


def train(config, display="quiet"):
    return run_training(config, "runs", display=display)


def swap_words():
    """Change a text without changing its length, so that nothing but its bytes tells."""
    path = Path("corpus", "colours.txt")
    path.write_text(path.read_text().replace("green", "brown"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder with a dense run of two steps, a checkpoint a step, and a SIGTERM in its last evaluation."""
    place = tmp_path_factory.mktemp("ended")
    evaluate = running.evaluate

    def evaluate_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setattr(running, "evaluate", evaluate_and_stop)
        config = small_config(Path("."), steps=2, sparse=False, checkpoint_every=1)
        return place, config, train(config)


@pytest.fixture
def run(ended, tmp_path, monkeypatch):
    """A copy of that run to work in: its configuration and its folder."""
    place, config, _ = ended
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return config, run_folder(config, "runs")


def test_a_signal_when_the_run_is_nearly_done_is_not_forgotten(ended, run):
    _, _, result = ended
    assert (result.status, result.step, result.stop_requested) == ("done", 2, True)
    assert result.summary is not None
    again = train(run[0])
    assert (again.status, again.stop_requested) == ("already done", False)


def test_a_stopped_run_does_not_go_on_with_another_text(run, monkeypatch):
    config, folder = run
    (folder / "done.json").unlink()
    monkeypatch.setattr(running.Run, "go", lambda self, *_, **__: RunResult(self.folder, "done", 2, None))
    assert train(config).status == "done"
    swap_words()
    with pytest.raises(RunError, match=f"the text in corpus {OTHER_TEXT}") as caught:
        train(config)
    assert caught.value.code == 2
    # A checkpoint from before there were fingerprints has none, and is gone on with.
    files = [file for file in (folder / "checkpoints" / "2").rglob("*") if file.is_file()]
    (file,) = [file for file in files if b"text_fingerprint" in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"text_fingerprint", b"some_other_thing"))
    assert train(config).status == "done"


def test_a_finished_run_of_another_text_is_not_called_done(run):
    config, folder = run
    done = read_json(folder / "done.json")
    assert done["text_fingerprint"] == load_packed(config.data).fingerprint
    swap_words()
    with pytest.raises(RunError, match=OTHER_TEXT) as caught:
        train(config)
    assert caught.value.code == 2
    # A run from before there were fingerprints, and one whose text is gone, are done all the same.
    write_json(folder / "done.json", {name: value for name, value in done.items() if "finger" not in name})
    assert train(config).status == "already done"
    write_json(folder / "done.json", done)
    shutil.rmtree("corpus")
    assert train(config).status == "already done"


def test_a_run_that_ends_without_a_finite_loss_says_so_each_time(run, capsys):
    config, folder = run
    (folder / "done.json").unlink()
    rows = read_rows(folder / "metrics.jsonl")
    rows[-1] |= {"val_loss": None, "max_vio": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(config, "plain")
    assert result.summary["val_loss"] is None and result.summary["max_vio"] is None
    assert result.summary == read_json(folder / "done.json")
    assert "is done: validation loss not finite" in capsys.readouterr().out
    assert train(config, "plain").status == "already done"
    assert "is already done: validation loss not finite after 2 steps" in capsys.readouterr().out


def test_a_row_that_is_not_finite_is_shown_in_words(capsys):
    row = {"step": 1, "loss": math.nan, "tokens_per_second": 1.0, "skipped": 0, "val_loss": math.inf}
    Display("plain", name="run", steps=3, start=0).show(row | {"val_loss_by_domain": {"prose": math.nan}})
    assert capsys.readouterr().out == (
        "step 1/3  loss not finite  1 tokens/s\nstep 1/3  validation loss not finite  (prose not finite)\n"
    )


def test_processes_that_were_not_joined_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ClusterError, match="2 processes that were not joined") as caught:
        train(small_config(tmp_path))
    assert caught.value.code == 2
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_dropless_experts_that_drop_are_warned_about(tmp_path):
    """Only too small a buffer makes them; on one device and with seats there is nothing to say."""
    config = small_config(tmp_path, moe=dict(dispatch="dropless"))
    layout = make_layout(MeshConfig(data=1, ragged_buffer_factor=1.5))
    said = no_room_warning(config, layout, 0.0123)
    assert said.startswith("1.23% of the choices found no room on their expert's device and were dropped")
    assert "raise mesh.ragged_buffer_factor=1.5, or leave it at None" in said
    assert no_room_warning(config, layout, 0.0) is None
    assert no_room_warning(config, None, 0.5) is None
    assert no_room_warning(small_config(tmp_path), layout, 0.5) is None


@pytest.mark.parametrize("split", [0, 1])
def test_a_packed_token_outside_the_vocabulary_is_found_in_either_split(tmp_path, split):
    config = small_config(tmp_path)
    rows = [Rows(np.full((3, 33), 258, np.uint16), np.zeros(3, np.uint8)) for _ in range(2)]
    corpus = PackedCorpus(("prose",), *rows, fingerprint="0123456789abcdef")
    check_vocabulary(corpus, config)
    rows[split].tokens[2, 32] = 259
    with pytest.raises(ValueError, match=r"hold token 259, outside model.vocab_size=259; .*cache/0123456789"):
        check_vocabulary(corpus, config)


def test_a_sentinel_outside_the_vocabulary_is_found(tmp_path):
    config = spans_config(tmp_path)
    special = SpecialTokens(shift=1, pad=0, eos=1, sentinels=(380, 382, 384, 1000))  # of which three are used
    rows = Rows(np.full((3, config.data.row_length), 5, np.uint16), np.zeros(3, np.uint8), special)
    corpus = PackedCorpus(("prose",), rows, rows, fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match="hold token 384, outside model.vocab_size=384"):
        check_vocabulary(corpus, config)
    rows = rows._replace(special=special._replace(pad=500, sentinels=(380, 381, 382)))
    with pytest.raises(ValueError, match="hold token 500, outside model.vocab_size=384"):
        check_vocabulary(corpus._replace(train=rows), config)


def test_a_run_refuses_a_cache_with_a_wrong_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path)
    file = tmp_path / "cache" / load_packed(config.data).fingerprint / "train.tokens"
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(RunError, match="hold token 65535") as caught:
        train(config)
    assert caught.value.code == 2 and not (tmp_path / "runs").exists()


def test_few_tokens_an_expert_and_group_are_warned_about(tmp_path, capsys, monkeypatch):
    # 32 tokens a group and 8 experts of ceil(1.25 * 4) = 5 seats. A load is binomial(32, 1/8); it turns away
    # 0.3443 tokens on average, 8.6% of the 4 that an expert has.
    few = small_config(tmp_path, steps=1, moe=dict(num_experts=8, sequences_per_group=1))
    load = np.array([1.0])
    for _ in range(32):
        load = np.convolve(load, [7 / 8, 1 / 8])
    turned_away = float(np.sum(load[6:] * np.arange(1, 28)))
    assert expected_drop(32, 8, 1, 5) == pytest.approx(8 * turned_away)
    wanted = (
        f"an expert has 4 tokens a group, so chance alone drops {8 * turned_away / 32:.1%} of the choices"
    )
    assert small_groups_warning(few).startswith(wanted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running.Run, "_steps", lambda *_: 0)  # it is said before the first step
    train(few)
    assert " ".join(capsys.readouterr().err.split()).count(wanted) == 1


FEW = dict(num_experts=8, sequences_per_group=1)


@pytest.mark.parametrize(
    "sparse, moe",
    [
        (False, None),
        (True, dict(num_experts=8)),
        # No seats, or nobody dropped by chance.
        (True, FEW | dict(dispatch="dropless")),
        (True, FEW | dict(overflow="next")),
    ],
)
def test_enough_tokens_an_expert_and_group_are_not(tmp_path, sparse, moe):
    # Two rows of 32 tokens for 8 experts are 8 tokens an expert, which is enough.
    assert small_groups_warning(small_config(tmp_path, sparse=sparse, moe=moe)) is None
