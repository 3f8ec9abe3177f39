"""Run folders: metrics, routing records and the command line."""

import json

import numpy as np
import pytest

from switchmoe.report import load_routing, read_metrics, read_run, save_routing
from switchmoe.report.__main__ import main
from tests.report.worlds import arm, two_layers


def write_run(folder, routing=True):
    folder.mkdir(parents=True)
    record = arm("tiny")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record.metrics))
    (folder / "done.json").write_text(json.dumps(record.summary))
    (folder / "config.json").write_text('{"name": "tiny"}')
    (folder / "env.json").write_text(
        '{"command": ["/usr/bin/python3", "pretrain.py", "tiny"], "device": "cpu"}'
    )
    if routing:
        save_routing(folder / "routing.npz", two_layers())
    return folder


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == 2.5
    # Torn inside a character, or down to a bare number, which is JSON but no row.
    path.write_bytes(b'{"step": 1}\n{"note": "\xc3')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n12')
    assert read_metrics(path) == [{"step": 1}]


def test_any_other_broken_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_metrics(path)


def test_routing_comes_back_as_it_was_saved(tmp_path):
    record = two_layers()
    save_routing(tmp_path / "routing.npz", record)
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file)
    back = load_routing(tmp_path / "routing.npz")
    assert back.domains == record.domains
    for name in ("load_LE", "kept_LE", "load_by_domain_NLE", "dropped_fraction_L", "dropped_by_position_LP"):
        np.testing.assert_array_equal(getattr(back, name), getattr(record, name))
    for ours, theirs in zip(back.snippets, record.snippets, strict=True):
        assert ours.domain == theirs.domain
        for name in ("token_ids_S", "expert_LSK", "weight_LSK", "kept_LSK"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04torn"])
def test_a_file_that_is_no_routing_record_is_one_sentence(tmp_path, content):
    path = tmp_path / "routing.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a routing record of switchmoe.report"):
        load_routing(path)
    np.savez(path, other=np.ones(2))
    with pytest.raises(ValueError, match="is not a routing record of switchmoe.report"):
        load_routing(path)


def test_read_run(tmp_path):
    record, routing, environment = read_run(write_run(tmp_path / "0"))
    assert (record.name, record.value("val_loss"), len(record.metrics)) == ("tiny", 1.5, 20)
    assert routing is not None and routing.domains == ("one", "two")
    assert environment["device"] == "cpu"
    assert read_run(write_run(tmp_path / "1", routing=False))[1] is None


def test_the_command_writes_the_page_into_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "0")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Run tiny" in page and "Validation text by expert" in page
    assert "python3 pretrain.py tiny" in page and "/usr/bin" not in page


def test_a_run_that_has_not_ended_gets_a_page_too(tmp_path):
    run = write_run(tmp_path / "0", routing=False)
    (run / "done.json").unlink()
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "No final validation loss was recorded; the last row is of step 20." in page
    assert page.count('role="img"') == 3


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    def complaint(path):
        assert main([str(path)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert complaint(tmp_path / "gone") == (
        f"{tmp_path / 'gone'} does not exist: name the folder of a run, the one with metrics.jsonl in it."
    )
    assert complaint(tmp_path) == (
        f"{tmp_path} is not a run, it has no metrics.jsonl: name the folder that holds one."
    )
    run = write_run(tmp_path / "tiny-abc" / "0")
    assert complaint(tmp_path).endswith(f"it has no metrics.jsonl; did you mean {run}?")
    assert complaint(run / "done.json").endswith(
        "is a file: name the folder of a run, the one with metrics.jsonl in it."
    )
    (run / "done.json").write_text("{")
    assert "done.json is not JSON" in complaint(run)
