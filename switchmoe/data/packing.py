"""Packs a corpus once into rows of one length, in memory-mapped files named by a hash of their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt, UInt8

from switchmoe.data.config import DataConfig
from switchmoe.data.corpora import find_domains, fingerprint, read_documents
from switchmoe.data.tokenizer import BYTES, ByteTokenizer, SpecialTokens
from switchmoe.data.tokenizer_file import FileTokenizer

FORMAT = 1  # raise it when other rows come from the same text, so that old caches are not read
SPLITS = ("train", "validation")
# As bytes, which are the byte tokenizer's tokens but for an offset, or as the ids of another tokenizer.
Document = bytes | Int32[np.ndarray, " _"]
Documents = Sequence[Document]
Split = tuple[Documents, Documents]


class Rows(NamedTuple):
    """Packed rows of R = `DataConfig.row_length` tokens, and for each the number of the domain it is from.

    A token is its id plus `special.shift`, and 0 is padding.
    """

    tokens: UInt[np.ndarray, "N R"]
    domain: UInt8[np.ndarray, " N"]
    special: SpecialTokens = BYTES

    @property
    def largest_id(self) -> int:
        """The largest of the text's ids, which a model's vocabulary must have."""
        return int(self.tokens.max()) - self.special.shift


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

    Raises ValueError for a source or a tokenizer that cannot be found or read.
    """
    return _fingerprint(config, find_domains(config.source), config.load_tokenizer())


def load_packed(config: DataConfig) -> PackedCorpus:
    """Pack the corpus into rows unless that was done before, and map the rows into memory.

    Rows are kept in cache_folder/HASH, where HASH covers the text, row_length, validation_fraction and
    FORMAT. The folder appears by one rename, complete or not at all, so that several processes may pack at
    once and a process that dies leaves nothing that is taken for rows.

    Raises ValueError, before anything is written, for a source or a tokenizer that cannot be used (see
    corpora and `FileTokenizer`), one without the sentinels that spans need, or a domain too small for one row
    in each split; and for a cache folder that cannot be written.
    """
    domains, tokenizer = find_domains(config.source), config.load_tokenizer()
    folder = config.cache_folder() / _fingerprint(config, domains, tokenizer)
    packed = _map_rows(folder)
    if packed is None:
        splits: dict[str, Split] = {
            domain: split_documents(
                _documents(path, tokenizer), config.row_length, config.validation_fraction, str(path)
            )
            for domain, path in domains.items()
        }
        try:
            _write(folder, splits, config.row_length, tokenizer)
        except OSError as error:
            raise ValueError(
                f"The cache folder {folder.parent} cannot be written ({error.strerror or error}); "
                "set cache_dir or $SWITCHMOE_CACHE to a folder that can, with room for the packed text."
            ) from error
        packed = _map_rows(folder)
        if packed is None:
            raise ValueError(f"The packed rows in {folder} were changed while being read; start again.")
    return packed


def _documents(path: Path, tokenizer: ByteTokenizer | FileTokenizer) -> Documents:
    """Read a file's documents, as bytes, which are tokens to the byte tokenizer, or as tokens."""
    documents = read_documents(path)
    return tokenizer.encode_documents(documents) if isinstance(tokenizer, FileTokenizer) else documents


def _fingerprint(
    config: DataConfig, domains: dict[str, Path], tokenizer: ByteTokenizer | FileTokenizer
) -> str:
    """Hash all that decides the rows to 16 hexadecimal digits."""
    try:
        text = fingerprint(domains)
    except OSError as error:
        raise ValueError(f"The corpus cannot be read ({error}); make its files readable.") from error
    # Less 1, since it was the sequence_length of a decoder before rows were cut for anything else.
    recipe = [FORMAT, text, config.row_length - 1, config.validation_fraction]
    if isinstance(tokenizer, FileTokenizer):
        recipe.append(tokenizer.fingerprint)
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def split_documents(documents: Documents, row_length: int, validation_fraction: float, name: str) -> Split:
    """Cut a domain's documents by position: the first part is trained on, the last is held out.

    The cut is at the boundary of documents nearest to the wanted place. Where that would take more than half
    of the smaller part away from either (one long document, say), the document at the wanted place is cut
    between two characters, or two tokens. Lengths count one end token a document; each part is wanted to fill
    a row.

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
    while isinstance(document, bytes) and 0x80 <= document[place] <= 0xBF:  # inside a character of UTF-8
        place -= 1
    return [*documents[:index], document[:place]], [document[place:], *documents[index + 1 :]]


def pack_documents(
    documents: Documents,
    row_length: int,
    tokenizer: ByteTokenizer | FileTokenizer = ByteTokenizer(),  # noqa: B008, it has no state
) -> UInt[np.ndarray, "N R"]:
    """Join the documents, an end token after each, and cut that into rows, the last one padded."""
    dtype, shift = _dtype(tokenizer), tokenizer.special.shift
    end = np.array([tokenizer.special.eos + shift], dtype)

    def tokens(document: Document) -> UInt[np.ndarray, " N"]:
        if isinstance(document, bytes):
            return ByteTokenizer().encode_bytes(document)
        return (document + shift).astype(dtype)

    parts = [part for document in documents for part in (tokens(document), end)]
    count = sum(part.size for part in parts)
    return np.concatenate([*parts, np.zeros(-count % row_length, dtype)]).reshape(-1, row_length)


def _dtype(tokenizer: ByteTokenizer | FileTokenizer) -> np.dtype:
    """Choose the type that rows are kept in: two bytes a token where that is enough."""
    return np.dtype("<u2" if tokenizer.vocab_size + tokenizer.special.shift <= 2**16 else "<u4")


def _write(
    folder: Path, splits: dict[str, Split], row_length: int, tokenizer: ByteTokenizer | FileTokenizer
) -> None:
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
                    rows = pack_documents(parts[which], row_length, tokenizer)
                    tokens.write(rows.tobytes())
                    domain.write(np.full(len(rows), number, np.uint8).tobytes())
                    counts[split] += len(rows)
                _to_disk(tokens, domain)
        about = {"format": FORMAT, "domains": list(splits), "row_length": row_length, **counts}
        if isinstance(tokenizer, FileTokenizer):
            about |= {"dtype": _dtype(tokenizer).str, "special": tokenizer.special._asdict()}
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
        dtype, special = np.dtype(about.get("dtype", "<u2")), BYTES
        if "special" in about:
            special = SpecialTokens(**about["special"] | {"sentinels": tuple(about["special"]["sentinels"])})
        splits = []
        for split in SPLITS:
            count, length = about[split], about["row_length"]
            paths = _paths(folder, split)
            # numpy refuses, with a ValueError, to map a file that is shorter than its shape says.
            tokens = np.memmap(paths[0], dtype, mode="r", shape=(count, length))
            splits.append(Rows(tokens, np.memmap(paths[1], np.uint8, mode="r", shape=(count,)), special))
        return PackedCorpus(tuple(about["domains"]), *splits, fingerprint=folder.name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
