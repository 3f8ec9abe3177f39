"""The cache of packed rows: written once, whole or not at all, by however many processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import switchmoe.data.packing as packing
from switchmoe.data import DataConfig, corpus_fingerprint, load_packed

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("one", "two"):
        (corpus / f"{name}.txt").write_text("\f".join(f"{name}, page {page}" for page in range(50)))
    return DataConfig(str(corpus), sequence_length=8, cache_dir=str(tmp_path / "cache"))


def refuse(*_, **__):
    raise AssertionError("packed again")


def rows_of(packed):
    return [np.array(part) for rows in (packed.train, packed.validation) for part in rows[:2]]


def assert_same(first, second):
    for a, b in zip(rows_of(first), rows_of(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_load_packs_nothing(config, monkeypatch):
    first = load_packed(config)
    monkeypatch.setattr(packing, "pack_documents", refuse)
    monkeypatch.setattr(packing, "read_documents", refuse)
    second = load_packed(config)
    assert first.domains == second.domains == ("one", "two")
    assert_same(first, second)
    assert len(os.listdir(config.cache_folder())) == 1


def test_the_fingerprint_follows_the_rows_and_needs_no_packing(config):
    before = corpus_fingerprint(config)
    assert not config.cache_folder().exists()
    assert load_packed(config).fingerprint == before == load_packed(config).fingerprint
    other_order = DataConfig(config.source, 8, seed=7, cache_dir=config.cache_dir)
    assert corpus_fingerprint(other_order) == before
    page = Path(config.source, "one.txt")
    page.write_text(page.read_text().replace("page 3", "leaf 3"))
    assert load_packed(config).fingerprint == corpus_fingerprint(config) != before


def test_what_changes_the_rows_changes_the_folder(config):
    load_packed(config)
    others = [
        DataConfig(config.source, 9, config.validation_fraction, cache_dir=config.cache_dir),
        DataConfig(config.source, 8, 0.2, cache_dir=config.cache_dir),
    ]
    for count, other in enumerate(others, 2):
        load_packed(other)
        assert len(os.listdir(config.cache_folder())) == count
    load_packed(DataConfig(config.source, 8, seed=7, cache_dir=config.cache_dir))  # the order is not packed
    assert len(os.listdir(config.cache_folder())) == 3
    page = Path(config.source, "one.txt")
    page.write_text(page.read_text().replace("page 3", "leaf 3"))
    load_packed(config)
    assert len(os.listdir(config.cache_folder())) == 4


@pytest.mark.parametrize("step", ["pack_documents", "_to_disk", "_publish"])
def test_a_write_that_fails_leaves_nothing(config, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(packing, step, refuse)
        with pytest.raises(AssertionError):
            load_packed(config)
    assert os.listdir(config.cache_folder()) == []
    load_packed(config)


@pytest.mark.parametrize("left", ["about.json", "train.tokens", "validation.domain"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_folder_that_is_not_whole_is_packed_again(config, left, damage):
    expected = rows_of(load_packed(config))
    (folder,) = config.cache_folder().iterdir()
    if damage == "missing":
        (folder / left).unlink()
    else:
        os.truncate(folder / left, (folder / left).stat().st_size - 1)
    for a, b in zip(expected, rows_of(load_packed(config)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(os.listdir(folder)) == sorted(
        ["about.json", "train.tokens", "train.domain", "validation.tokens", "validation.domain"]
    )


def start(config, before="", wait_for=None):
    """Start a Python process that packs, once it has run some code and its input says go."""
    program = (
        "import os, signal, sys, time\n"
        "from switchmoe.data import DataConfig, load_packed, packing\n"
        f"{before}\nprint('ready', flush=True); sys.stdin.readline()\n"
        f"packed = load_packed({config!r})\nprint(int(packed.train.tokens.astype(int).sum()))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_leaves_nothing_that_is_taken_for_rows(config):
    killed = start(config, "os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate("go\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = os.listdir(config.cache_folder())
    assert len(left) == 1 and left[0].startswith(".unfinished-")
    load_packed(config)
    assert len(os.listdir(config.cache_folder())) == 2


def test_processes_that_pack_at_once_agree(config):
    # Each waits before its rename until all three have written their rows, so that all of them try it.
    meet = (
        "publish = packing._publish\n"
        "def wait(unfinished, folder):\n"
        "    meeting = folder.parent.parent / 'meeting'\n"
        "    meeting.mkdir(exist_ok=True)\n"
        "    (meeting / str(os.getpid())).touch()\n"
        "    deadline = time.monotonic() + 50\n"
        "    while len(os.listdir(meeting)) < 3:\n"
        "        assert time.monotonic() < deadline\n"
        "        time.sleep(0.01)\n"
        "    publish(unfinished, folder)\n"
        "packing._publish = wait"
    )
    racers = [start(config, meet) for _ in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    sums = {racer.communicate(timeout=60)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sums == {f"{int(load_packed(config).train.tokens.astype(int).sum())}\n"}
    assert len(os.listdir(config.cache_folder())) == 1


def test_a_cache_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    impossible = DataConfig(config.source, 8, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ValueError, match=r"file/cache cannot be written \(Not a directory\); set cache_dir or"
    ):
        load_packed(impossible)
