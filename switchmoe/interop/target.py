"""Where tensors go: safetensors files in a new folder that gets its name only when all is on the disk."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from switchmoe.interop.errors import WeightsError
from switchmoe.interop.source import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = "model"


class ToWrite(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: in the file.
      shape: of the whole.
      dtype: of its numbers in the file.
      pieces: makes its numbers, one stretch after the other, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(path: Path, *, files: Iterable[Path] = (), overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and let it take that name at the end, if there was no error.

    Before that `files` are copied into it, but for those whose names are there. Whatever goes wrong, `path`
    is as it was, and the temporary folder is removed.

    Raises:
      WeightsError: no folder can be made there; or there is something already, and `overwrite` is not set, or
        it is a file, or a folder with folders in it, which is more than weights.
    """
    if path.exists() and not path.is_dir():
        raise WeightsError(f"{path} is a file; give the name of a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise WeightsError(f"{path} is not empty; give another folder, or overwrite=True to replace it.")
    inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    if inside:
        raise WeightsError(
            f"{path} has the folder {inside[0]} in it, so it is not just weights and is not replaced; give "
            "another folder."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise WeightsError(
            f"no folder can be made in {path.parent} ({error}); give another place."
        ) from error
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        for file in files:
            if not (new / file.name).exists():
                shutil.copyfile(file, new / file.name)
        for file in new.iterdir():
            _flush(file)
        old = temporary / "old"
        try:
            if path.is_dir():
                path.rename(old)
            new.rename(path)
        except BaseException:  # an interrupt too
            if old.is_dir() and not path.is_dir():
                old.rename(path)
            raise
    finally:
        if path.is_dir() or not (temporary / "old").is_dir():  # else it is the only copy of what was there
            shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(folder: Path, tensors: list[ToWrite], *, max_shard_bytes: int) -> None:
    """Write tensors one after the other, in shards of at most so many bytes (or of one larger tensor)."""
    shards: list[list[ToWrite]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    if len(shards) == 1:
        _write_file(folder / f"{_NAME}.safetensors", shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{_NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        places.update({tensor.name: name for tensor in shard})
    total = sum(tensor.size for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{_NAME}.safetensors.index.json", index)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, tensors: list[ToWrite]) -> None:
    """Write 8 bytes of length, a JSON header of that length, and the tensors as the header says.

    By hand, since the safetensors library wants all tensors of a file in memory at once. Source:
    https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers start at a multiple of 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for tensor in tensors:
            start = opened.tell()
            for piece in tensor.pieces():
                whole = np.ascontiguousarray(piece, tensor.dtype)
                opened.write(whole.reshape(-1).view(np.uint8).data)
            if opened.tell() - start != tensor.size:
                raise AssertionError(f"the pieces of {tensor.name} do not have its shape {tensor.shape}.")


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
