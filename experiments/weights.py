"""Weights for a command, wherever they are: of a run, of Hugging Face, or a folder of weights alone."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from switchmoe.config import MoEConfig
from switchmoe.interop import (
    FAMILIES,
    MODEL_TYPE,
    WeightsError,
    from_hf,
    from_t5x,
    load_weights,
    new_folder,
    to_t5x,
)
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.config import ComputeType
from switchmoe.parallel import Layout
from switchmoe.train import load_model

Kind = Literal["run", "hf", "switchmoe", "t5x"]
_ARRAYS = "arrays.npz"


def read_model(
    path: str | Path, *, dtype: ComputeType | None = None, layout: Layout | None = None
) -> TransformerLM:
    """Read a model from whatever folder there is: a run's, Hugging Face's, or one that convert.py wrote.

    `dtype` and `layout` are those of `from_hf`; a run's weights stay as they are.

    Raises:
      ValueError: one sentence, if the folder is none of these, or does not hold what it should.
      RunError: the run has no checkpoint.
    """
    folder = Path(path).expanduser()
    kind = tell_kind(folder)
    if kind == "hf":
        return from_hf(folder, dtype=dtype, layout=layout)
    if kind == "switchmoe":
        return load_weights(folder, dtype=dtype, layout=layout)
    if kind == "t5x":
        return _read_t5x(folder, dtype, layout)
    return load_model(folder)[0]


def tell_kind(folder: Path) -> Kind:
    """Tell what a folder holds by its config.json.

    Raises:
      ValueError: nothing that is known.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict):
        raise WeightsError(
            f"{folder} has no config.json that can be read; give the folder of a run (OUT/NAME-HASH/SEED), "
            "of weights of Hugging Face's, or of weights that convert.py wrote."
        )
    if "train" in about and "model" in about:
        return "run"
    if about.get("model_type") in (MODEL_TYPE, "t5x"):
        return "t5x" if about["model_type"] == "t5x" else "switchmoe"
    if "model_type" in about:
        return "hf"
    raise WeightsError(
        f"{folder / 'config.json'} is neither a run's nor one of {', '.join(FAMILIES)}; give another folder."
    )


def write_t5x(
    model: TransformerLM, path: Path, *, files: Iterable[Path] = (), overwrite: bool = False
) -> None:
    """Write a Switch Transformer as T5X lays it out: arrays.npz, in float32, with our config.json."""
    arrays: dict[str, Any] = {name: array.astype(np.float32) for name, array in to_t5x(model).items()}
    with new_folder(path, files=files, overwrite=overwrite) as folder:
        about = {"model_type": "t5x", "model": dataclasses.asdict(model.config)}
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        np.savez(folder / _ARRAYS, **arrays)


def _read_t5x(folder: Path, dtype: ComputeType | None, layout: Layout | None) -> TransformerLM:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
        config = LMConfig(**(settings | {"moe": settings["moe"] and MoEConfig(**settings["moe"])}))
        with np.load(folder / _ARRAYS, allow_pickle=False) as saved:
            arrays = dict(saved)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder} does not hold what convert.py --to t5x writes: {error}") from error
    return from_t5x(arrays, config, dtype=dtype, layout=layout)
