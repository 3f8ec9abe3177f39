"""Where tensors come from: safetensors files, read a slice at a time, or dictionaries of arrays."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from switchmoe.interop.errors import WeightsError

# By the names in the files. The library gives numpy arrays of these; bfloat16 is that of ml_dtypes.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Stored(NamedTuple):
    """A tensor that can be read.

    Attributes:
      shape: of the whole tensor.
      dtype: of its numbers.
      file: the file's name, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str = ""


class SafetensorsFolder:
    """The tensors of a folder with model.safetensors, or with model.safetensors.index.json and its shards.

    Files are read with pread and not mapped into memory, where the pages that were read would count beside
    the model that they were copied to. All headers are read when it is made, no tensor is. Use it in a
    `with`.

    Attributes:
      what: how to call it in a message.
      tensors: what there is, by name.

    Raises:
      WeightsError: there are no such files, or only pickles, which are never opened; one is missing, cut
        short or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.what = str(folder)
        self.tensors: dict[str, Stored] = {}
        self._parts: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            for file in _find_files(folder):
                self._add(file, opened)
            self._opened = opened.pop_all()

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._parts.clear()
        self._opened.close()

    def read(self, name: str, part: tuple[int | slice, ...]) -> np.ndarray:
        """Read a part of a tensor, as numpy would index it; nothing else is read."""
        try:
            return self._parts[name][part or (slice(None),)]
        except (SafetensorError, OSError) as error:
            where = f"{self.what}/{self.tensors[name].file}"
            raise WeightsError(f"{name} can't be read from {where} ({error}); get it again.") from error

    def _add(self, file: Path, opened: contextlib.ExitStack) -> None:
        try:
            handle = opened.enter_context(safe_open(file, framework="np", backend="pread"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is no whole safetensors file ({error}), so it was cut short or damaged; "
                "download it again."
            ) from error
        for name in handle.keys():
            if name in self.tensors:
                raise WeightsError(
                    f"{name} is both in {self.tensors[name].file} and in {file.name} of {self.what}; "
                    "remove the file that does not belong to these weights."
                )
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise WeightsError(
                    f"{name} in {file} has the type {part.get_dtype()}; only {', '.join(DTYPES)} are read, "
                    "so convert quantized weights back first."
                )
            self._parts[name] = part
            self.tensors[name] = Stored(tuple(part.get_shape()), DTYPES[part.get_dtype()], file.name)


class FlatDict:
    """The arrays of a flat dictionary, as a source."""

    def __init__(self, arrays: dict[str, Any], what: str) -> None:
        self.what = what
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.tensors = {name: Stored(array.shape, array.dtype) for name, array in self._arrays.items()}

    def read(self, name: str, part: tuple[int | slice, ...]) -> np.ndarray:
        """Give a part of an array."""
        return self._arrays[name][part]


# Something that holds tensors by name and reads parts of them.
Source = SafetensorsFolder | FlatDict


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      WeightsError: the file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(_no_file(file)) from None
    except (ValueError, OSError) as error:
        raise WeightsError(f"{file} can't be read as JSON ({error}); get it again from its source.") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a JSON {type(value).__name__}, but must hold an object.")
    return value


def _no_file(file: Path) -> str:
    if file.parent.is_dir():
        return f"{file.parent} has no {file.name}, so it is no folder of Hugging Face weights."
    return f"{file.parent} is no folder; give a folder on this machine, to which the weights were downloaded."


def _find_files(folder: Path) -> list[Path]:
    """Name the weight files of a folder: the one, or those that the index names."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        named = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise WeightsError(f"{folder / _INDEX} has no weight_map; get it again from its source.")
        files = sorted(set(map(str, named.values())))
        strange = [name for name in files if Path(name).name != name]
        if strange:
            raise WeightsError(f"{folder / _INDEX} names {strange[0]}, which is outside of its folder.")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise WeightsError(
                f"{folder} has no {missing[0]}, one of the {len(files)} files that {_INDEX} names; "
                "download it again."
            )
        return [folder / name for name in files]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any program when it is opened; only "
            "safetensors is read, so save the weights as that (save_pretrained in transformers does)."
        )
    raise WeightsError(f"{folder} has neither {_SINGLE} nor {_INDEX}, so there are no weights to read.")
