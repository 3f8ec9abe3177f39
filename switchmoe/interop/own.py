"""Weights with nothing else, under our own names: whatever a model is, with its configuration beside it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from switchmoe.config import MoEConfig
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.load import fill
from switchmoe.interop.names import Names, Piece, Weight, choose_pieces
from switchmoe.interop.save import arrays_of, tensors_of
from switchmoe.interop.source import SafetensorsFolder, read_json
from switchmoe.interop.target import new_folder, write_json, write_safetensors
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.config import ComputeType
from switchmoe.parallel import Layout

MODEL_TYPE = "switchmoe"


def save_weights(
    model: TransformerLM,
    path: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write a model's weights, balance biases among them, and its configuration; nothing is converted.

    The folder gets its name when all is in it, `files` to be copied there too.

    Raises:
      WeightsError: there is something there already (see `overwrite`), or the model is quantized.
    """
    arrays = arrays_of(model)
    tensors = tensors_of(_find(arrays), arrays, None, stacked=False, copies={})
    with new_folder(Path(path).expanduser(), files=files, overwrite=overwrite) as folder:
        about = {"model_type": MODEL_TYPE, "model": dataclasses.asdict(model.config)}
        write_json(folder / "config.json", about)
        write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)


def load_weights(
    path: str | Path, *, dtype: ComputeType | None = None, layout: Layout | None = None, **changes: Any
) -> TransformerLM:
    """Read what `save_weights` wrote; see `from_hf` for the arguments.

    Raises:
      WeightsError: one sentence that names what is missing or does not fit.
    """
    folder = Path(path).expanduser()
    about = read_json(folder / "config.json")
    if about.get("model_type") != MODEL_TYPE:
        raise WeightsError(
            f"{folder} holds model_type={about.get('model_type')!r} and not weights that save_weights wrote."
        )
    if dtype is not None:
        changes = {"dtype": dtype, "param_dtype": dtype} | changes
    try:
        settings = dict(about["model"])
        if settings["moe"] is not None:
            settings["moe"] = MoEConfig(**settings["moe"])
        config = LMConfig(**(settings | changes))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} is no configuration of a model: {error}") from error
    with SafetensorsFolder(folder) as source:
        return fill(config, source, layout, lambda leaves: choose_pieces(_find(leaves), source))


def _find(leaves: Mapping[Names, Any]) -> list[Weight]:
    """Name each weight by its path; it is one piece, turned in no way."""
    weights = []
    for path, array in leaves.items():
        shape = tuple(array.shape)
        dims = " ".join(f"d{number}" for number in range(len(shape)))
        weights.append(
            Weight(path, shape, [[Piece(".".join(path), shape, (), shape, f"{dims} -> {dims}", ())]])
        )
    return weights
