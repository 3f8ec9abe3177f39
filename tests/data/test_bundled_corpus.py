"""The corpus that comes with the package, and the script that cut it."""

import lzma

import numpy as np
import pytest

from experiments.make_corpus import SPLITTERS, take_evenly, tidy
from switchmoe.data import ByteTokenizer, DataConfig, load_packed
from switchmoe.data.corpora import BUNDLED, find_domains, read_documents

DOMAINS = ("bible_english", "bible_spanish", "python_stdlib", "shakespeare", "wordnet_glosses")


def test_five_domains_of_one_size_each_with_its_licence():
    domains = find_domains("bundled")
    assert tuple(domains) == DOMAINS
    assert sum(path.stat().st_size for path in domains.values()) < 1_300_000
    for domain, path in domains.items():
        text = lzma.decompress(path.read_bytes())
        assert 900_000 < len(text) < 1_000_000, domain
        assert not set(text.decode("utf-8")) & {"\0", "\r", "\ufeff", "\ufffd"}, domain
        licence = (BUNDLED / "LICENSES" / f"{domain}.txt").read_text()
        assert f"{domain}.txt.xz" in licence and len(licence) > 200


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("bible_english", "public domain"),
        ("bible_spanish", "public domain"),
        ("shakespeare", "Permission is hereby granted, free of charge"),
        ("wordnet_glosses", "WordNet 3.0 Copyright 2006 by Princeton University."),
        ("python_stdlib", "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
    ],
)
def test_the_licences_say_what_they_must(domain, words):
    assert words in (BUNDLED / "LICENSES" / f"{domain}.txt").read_text()


def test_documents_can_be_told_apart():
    for domain, path in find_domains("bundled").items():
        documents = read_documents(path)
        assert len(documents) > 150, domain
        assert max(map(len, documents)) < 60_001
        assert len(set(documents)) == len(documents)


def test_it_packs(tmp_path):
    packed = load_packed(DataConfig(cache_dir=str(tmp_path)))
    assert packed.domains == DOMAINS
    for rows, least, most in ((packed.train, 3200, 3700), (packed.validation, 120, 220)):
        counts = np.bincount(rows.domain, minlength=5)
        assert least < counts.min() and counts.max() < most
    text = ByteTokenizer().decode(packed.train.tokens[0])
    first = read_documents(find_domains("bundled")["bible_english"])[0].decode()
    assert text == first[:257] and text.startswith("Genesis ")


@pytest.mark.parametrize(
    ("domain", "text", "documents"),
    [
        ("bible_english", "\nJob 1\n\n  1 A\nb.\n  2 C.\n\n1 John 2\n\n  1 D.", ["Job 1", "1 John 2"]),
        # The verse with a number of Strong's goes; so does the chapter that would lose one of two.
        ("bible_spanish", "A\nB\nC\nD <G1>\nE  \nF\nG <H2>   \n(end)", ["A"]),
        (
            "shakespeare",
            "# Play\n\n## ACT I\n\n### SCENE I\nHo\n\n### SCENE II\nHa",
            ["# Play", "### SCENE II"],
        ),
        ("python_stdlib", '"""A."""\n' + "a = 1\n" * 80 + '\n"""B."""\n' + "b = 1\n" * 80, ['"""A', '"""B']),
    ],
)
def test_sources_fall_into_documents(domain, text, documents):
    found = list(SPLITTERS[domain](text))
    assert len(found) == len(documents)
    for document, beginning in zip(found, documents, strict=True):
        assert tidy(document).startswith(beginning)


def test_a_gloss_is_taken_once():
    entries = [f"word {number}\n    n 1: gloss {number // 2}" for number in range(100)]
    runs = list(SPLITTERS["wordnet_glosses"]("\n".join(entries)))
    assert [run.count("gloss") for run in runs] == [24, 24]
    assert "word 1\n" not in runs[0] and "word 2\n" in runs[0]


def test_documents_are_taken_evenly_and_whole():
    assert take_evenly(["1", "2", "3", "4", "5", "6"], 3) == ["1", "3", "5"]
    assert take_evenly(["a", "b"], 100) == ["a", "b"]
    taken = take_evenly([str(number) * (1 + number % 5) for number in range(500)], 300)
    assert abs(sum(map(len, taken)) - 300) <= 15
