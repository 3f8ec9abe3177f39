"""Finds the text files of a corpus, reads their documents, and says in a sentence what is wrong with them."""

import hashlib
import lzma
from pathlib import Path

BUNDLED = Path(__file__).parent / "corpus"
SUFFIXES = (".txt", ".txt.xz")


def find_domains(source: str) -> dict[str, Path]:
    """Give the text files of a source by domain (the file's name without its suffix), in alphabetical order.

    Raises ValueError when the folder is missing or no folder, holds no text files, holds two files of one
    domain or more than 256 files.
    """
    folder = BUNDLED if source == "bundled" else Path(source).expanduser()
    if not folder.exists():
        raise ValueError(
            f'The corpus folder {folder} does not exist; give an existing folder of .txt files, or "bundled".'
        )
    if not folder.is_dir():
        raise ValueError(f"The corpus {folder} is not a folder; give the folder that the text files are in.")
    domains: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None or path.name.startswith(".") or not path.is_file():
            continue
        domain = path.name.removesuffix(suffix)
        if domain in domains:
            raise ValueError(
                f"{domains[domain]} and {path.name} are files of one domain; remove one of them."
            )
        domains[domain] = path
    if not domains:
        raise ValueError(f"The corpus folder {folder} has no .txt or .txt.xz files; put one there a domain.")
    if len(domains) > 256:
        raise ValueError(
            f"The corpus folder {folder} has {len(domains)} text files; join them to at most 256."
        )
    return dict(sorted(domains.items()))


def fingerprint(domains: dict[str, Path]) -> str:
    """Give a digest of the domains' names and of every byte of their files."""
    digest = hashlib.sha256()
    for domain, path in domains.items():
        digest.update(f"{domain}:{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_documents(path: Path) -> list[bytes]:
    """Give the documents of one file in order: what stands between form feeds, without empty lines around it.

    Raises ValueError when the file is damaged xz, is not UTF-8 (with the offset of the first wrong byte) or
    has no text.
    """
    data = path.read_bytes()
    if path.name.endswith(".xz"):
        try:
            data = lzma.decompress(data)
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} cannot be decompressed ({error}); make it again with xz.") from error
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start} of its text; convert it, for instance with iconv."
        ) from error
    documents = [document for piece in data.split(b"\f") if (document := piece.strip(b"\r\n"))]
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path} is empty; put text in it or remove it.")
    return documents
