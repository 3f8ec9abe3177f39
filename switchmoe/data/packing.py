"""Packs a corpus once into rows of one length, in memory-mapped files named by a hash of their content."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt16

from switchmoe.data.config import DataConfig
from switchmoe.data.corpora import find_domains, fingerprint, read_documents
from switchmoe.data.tokenizer import ByteTokenizer

FORMAT = 1  # raise it when other rows come from the same text, so that old caches are not read
SPLITS = ("train", "validation")


class Rows(NamedTuple):
    """Packed rows of R = sequence_length + 1 tokens, and for each row the number of the domain it is from."""

    tokens: UInt16[np.ndarray, "N R"]
    domain: UInt8[np.ndarray, " N"]


class PackedCorpus(NamedTuple):
    """A corpus cut into rows: its domains' names, the rows to train on and the held-out rows.

    `fingerprint` is the name of the folder that the rows are in: other rows, another fingerprint.
    """

    domains: tuple[str, ...]
    train: Rows
    validation: Rows
    fingerprint: str


def corpus_fingerprint(config: DataConfig) -> str:
    """Name the rows that a corpus is cut into, by its text and how it is cut, without cutting it.

    Raises ValueError for a source that cannot be found or read.
    """
    return _fingerprint(config, find_domains(config.source))


def load_packed(config: DataConfig) -> PackedCorpus:
    """Pack the corpus into rows unless that was done before, and map the rows into memory.

    Rows are kept in cache_folder/HASH, where HASH covers the text, sequence_length, validation_fraction and
    FORMAT. The folder appears by one rename, complete or not at all, so that several processes may pack at
    once and a process that dies leaves nothing that is taken for rows.

    Raises ValueError, before anything is written, for a source that cannot be used (see corpora) or a domain
    too small for one row in each split; and for a cache folder that cannot be written.
    """
    domains = find_domains(config.source)
    folder = config.cache_folder() / _fingerprint(config, domains)
    packed = _map_rows(folder)
    if packed is None:
        splits = {
            domain: split_documents(
                read_documents(path), config.sequence_length + 1, config.validation_fraction, str(path)
            )
            for domain, path in domains.items()
        }
        try:
            _write(folder, splits, config.sequence_length + 1)
        except OSError as error:
            raise ValueError(
                f"The cache folder {folder.parent} cannot be written ({error.strerror or error}); "
                "set cache_dir or $SWITCHMOE_CACHE to a folder that can, with room for the packed text."
            ) from error
        packed = _map_rows(folder)
        if packed is None:
            raise ValueError(f"The packed rows in {folder} were changed while being read; start again.")
    return packed


def _fingerprint(config: DataConfig, domains: dict[str, Path]) -> str:
    """Hash all that decides the rows to 16 hexadecimal digits."""
    try:
        text = fingerprint(domains)
    except OSError as error:
        raise ValueError(f"The corpus cannot be read ({error}); make its files readable.") from error
    recipe = [FORMAT, text, config.sequence_length, config.validation_fraction]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def split_documents(
    documents: list[bytes], row_length: int, validation_fraction: float, name: str
) -> tuple[list[bytes], list[bytes]]:
    """Cut a domain's documents by position: the first part is trained on, the last is held out.

    The cut is at the boundary of documents nearest to the wanted place. Where that would take more than half
    of the smaller part away from either (one long document, say), the document at the wanted place is cut
    between two characters. Lengths count one end token a document; each part is wanted to fill a row.

    Raises ValueError when the domain, called by name, has fewer than two rows of tokens.
    """
    ends = np.cumsum([len(document) + 1 for document in documents])
    total = int(ends[-1])
    if total < 2 * row_length:
        raise ValueError(
            f"{name} has {total} tokens, too few for a row of {row_length} to train on and another to "
            f"validate on; give it at least {2 * row_length} or lower sequence_length."
        )
    held_out = min(max(round(validation_fraction * total), row_length), total - row_length)
    cut = total - held_out
    if len(documents) > 1:
        nearest = int(np.argmin(np.abs(ends[:-1] - cut)))
        if abs(int(ends[nearest]) - cut) <= min(cut, held_out) / 2:
            return documents[: nearest + 1], documents[nearest + 1 :]
    index = int(np.searchsorted(ends, cut, side="right"))
    document = documents[index]
    place = cut - (int(ends[index]) - len(document) - 1)
    while 0x80 <= document[place] <= 0xBF:  # a byte inside a character of UTF-8
        place -= 1
    return [*documents[:index], document[:place]], [document[place:], *documents[index + 1 :]]


def pack_documents(documents: list[bytes], row_length: int) -> UInt16[np.ndarray, "N R"]:
    """Join the documents, an end token after each, and cut that into rows, the last one padded."""
    tokenizer = ByteTokenizer()
    end = np.array([tokenizer.eos], np.uint16)
    parts = [part for document in documents for part in (tokenizer.encode_bytes(document), end)]
    count = sum(part.size for part in parts)
    padding = np.full(-count % row_length, tokenizer.pad, np.uint16)
    return np.concatenate([*parts, padding]).reshape(-1, row_length)


def _write(folder: Path, splits: dict[str, tuple[list[bytes], list[bytes]]], row_length: int) -> None:
    """Write the rows of all domains beside the folder, and rename that to it when all is on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        counts = {}
        for which, split in enumerate(SPLITS):
            counts[split] = 0
            paths = _paths(unfinished, split)
            with paths[0].open("wb") as tokens, paths[1].open("wb") as domain:
                for number, parts in enumerate(splits.values()):
                    rows = pack_documents(parts[which], row_length)
                    tokens.write(rows.astype("<u2").tobytes())
                    domain.write(np.full(len(rows), number, np.uint8).tobytes())
                    counts[split] += len(rows)
                _to_disk(tokens, domain)
        about = {"format": FORMAT, "domains": list(splits), "row_length": row_length, **counts}
        with (unfinished / "about.json").open("w") as file:
            json.dump(about, file)
            _to_disk(file)
        unfinished.chmod(0o755)  # a temporary folder is its owner's alone; a cache may be shared
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    """Give where a split's tokens and the numbers of its domains are kept."""
    return folder / f"{split}.tokens", folder / f"{split}.domain"


def _to_disk(*files: IO) -> None:
    """Wait until what was written is on the disk, so that a rename cannot come before it."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename the written folder into place, unless another process was first; clear away a damaged one."""
    if folder.exists() and _map_rows(folder) is None:
        shutil.rmtree(folder)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if _map_rows(folder) is None:
            raise


def _map_rows(folder: Path) -> PackedCorpus | None:
    """Map the rows of a cache folder into memory; None unless every file is there in its full length."""
    try:
        about = json.loads((folder / "about.json").read_text())
        splits = []
        for split in SPLITS:
            count, length = about[split], about["row_length"]
            paths = _paths(folder, split)
            # numpy refuses, with a ValueError, to map a file that is shorter than its shape says.
            tokens = np.memmap(paths[0], np.dtype("<u2"), mode="r", shape=(count, length))
            splits.append(Rows(tokens, np.memmap(paths[1], np.uint8, mode="r", shape=(count,))))
        return PackedCorpus(tuple(about["domains"]), *splits, fingerprint=folder.name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
