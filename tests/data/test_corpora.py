"""Reading text files, and one sentence for each thing that can be wrong with them before any write."""

import lzma

import pytest

from switchmoe.data import DataConfig, load_packed
from switchmoe.data.corpora import find_domains, fingerprint, read_documents


def test_documents_stand_between_form_feeds(tmp_path):
    (tmp_path / "b.txt").write_bytes("\nuno\ndos\n\f\n\f\r\ntrés\f".encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"one"))
    (tmp_path / "notes.md").write_text("no text to train on")
    (tmp_path / ".hidden.txt").write_text("nor this")
    domains = find_domains(str(tmp_path))
    assert list(domains) == ["a", "b"]
    assert read_documents(domains["a"]) == [b"one"]
    assert read_documents(domains["b"]) == [b"uno\ndos", "trés".encode()]


def test_every_byte_and_name_counts_in_the_fingerprint(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.txt").write_text(text)
        return fingerprint(find_domains(str(folder)))

    first = digest(a="one", b="two")
    assert digest(a="one", b="two") == first
    others = [digest(a="one", b="twO"), digest(a="one", c="two"), digest(a="onet", b="wo"), digest(a="one")]
    assert len({first, *others}) == 5


GOOD = b"plenty of text here. " * 20


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "corpus does not exist; give an existing folder"),
        (GOOD, "corpus is not a folder; give the folder"),
        ({}, r"corpus has no \.txt or \.txt\.xz files; put one there"),
        ({"notes.md": GOOD}, r"corpus has no \.txt or \.txt\.xz files"),
        ({"a.txt": b""}, r"a\.txt is empty; put text in it or remove it"),
        ({"a.txt": b" \n\f\n\t\n"}, r"a\.txt is empty"),
        ({"a.txt": GOOD, "b.txt": b"caf\xe9 con leche"}, r"b\.txt is not UTF-8 at byte 3 of its text"),
        ({"a.txt.xz": lzma.compress(b"ok\xff")}, r"a\.txt\.xz is not UTF-8 at byte 2 of its text"),
        ({"a.txt.xz": b"not xz"}, r"a\.txt\.xz cannot be decompressed \(.*\); make it again with xz"),
        ({"a.txt.xz": lzma.compress(GOOD)[:-8]}, r"a\.txt\.xz cannot be decompressed"),
        ({"a.txt": GOOD, "a.txt.xz": GOOD}, r"a\.txt and a\.txt\.xz are files of one domain; remove one"),
        # 16 characters and an end token make 17 tokens; two rows of 9 need 18.
        (
            {"a.txt": GOOD, "b.txt": b"sixteen letters."},
            r"b\.txt has 17 tokens, too few .* at least 18 or lower",
        ),
        ({f"{number}.txt": GOOD for number in range(257)}, "has 257 text files; join them to at most 256"),
    ],
)
def test_one_sentence_and_nothing_written(tmp_path, files, sentence):
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    if isinstance(files, bytes):
        corpus.write_bytes(files)
    elif files is not None:
        corpus.mkdir()
        for name, data in files.items():
            (corpus / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_packed(DataConfig(str(corpus), sequence_length=8, cache_dir=str(cache)))
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert not cache.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": ""}, "source is empty; give"),
        ({"sequence_length": 7}, "sequence_length is 7; give at least 8 tokens"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0; give a share between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; give a share between 0 and 1"),
        ({"seed": -1}, "The data seed is -1; give a whole number"),
        ({"seed": 2**32}, "The data seed is 4294967296; give a whole number"),
    ],
)
def test_settings_that_cannot_be(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**change)


def test_where_rows_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SWITCHMOE_CACHE", raising=False)
    assert DataConfig().cache_folder() == tmp_path / "home" / ".cache" / "switchmoe"
    monkeypatch.setenv("SWITCHMOE_CACHE", str(tmp_path / "variable"))
    assert DataConfig().cache_folder() == tmp_path / "variable"
    assert DataConfig(cache_dir=str(tmp_path / "given")).cache_folder() == tmp_path / "given"
