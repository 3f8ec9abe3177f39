"""A model of ours -> Hugging Face's config.json and safetensors, a tensor at a time."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from switchmoe.config import check_at_least, check_choice
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.families import write_config
from switchmoe.interop.load import names_of
from switchmoe.interop.names import Names, Piece, Weight, find_weights, turn_back
from switchmoe.interop.target import ToWrite, new_folder, write_json, write_safetensors
from switchmoe.models import TransformerLM
from switchmoe.models.config import ComputeType
from switchmoe.nn import BalanceBias
from switchmoe.shapes import Array


def to_hf(
    model: TransformerLM,
    path: str | Path,
    *,
    dtype: ComputeType | None = None,
    stacked: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    extra: Mapping[str, Any] | None = None,
    files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write a model as the folder that `from_pretrained` of transformers reads: config.json and safetensors.

    The family follows from the model (an encoder: Switch Transformer; dense: Llama; norms of queries and keys
    over all heads: OLMoE, over each: Qwen3-MoE; else Mixtral). A model that transformers would compute
    otherwise is refused. Everything is written into a folder beside `path`, which gets its name at the end.

    Args:
      model: with its weights; on a mesh too, in one process.
      path: the folder; new or empty, or `overwrite`.
      dtype: of the numbers in the files; None is the model's `param_dtype`.
      stacked: write all experts of a layer as one tensor, as transformers has them in memory, where the
        family has a name for that; otherwise one by one, as they are published.
      max_shard_bytes: from this size on there is more than one file.
      extra: settings of config.json that a model here does not have, to add or to replace, such as
        eos_token_id and pad_token_id (null unless given) or max_position_embeddings.
      files: to be copied into the folder too, such as a tokenizer.json.
      overwrite: replace what is at `path`, once all is written.

    Raises:
      WeightsError: one sentence, before anything is written.
    """
    path = Path(path).expanduser()
    written = dtype or model.config.param_dtype
    check_choice("dtype", written, get_args(ComputeType))
    check_at_least("max_shard_bytes", max_shard_bytes, 1)
    family, settings = write_config(model.config, written)
    arrays = arrays_of(model)
    weights = find_weights(model.config, family.table, arrays)
    copies = {} if model.config.tie_embeddings else family.copies
    tensors = tensors_of(weights, arrays, jnp.dtype(written), stacked=stacked, copies=copies)
    with new_folder(path, files=files, overwrite=overwrite) as folder:
        write_json(folder / "config.json", settings | dict(extra or {}))
        write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)


def arrays_of(model: TransformerLM) -> dict[Names, Array]:
    """List a model's weights by their paths.

    Raises:
      WeightsError: this process does not hold all of one, or the model is quantized or laid out for
        generating.
    """
    state = nnx.to_pure_dict(nnx.split(model, (nnx.Param, BalanceBias), ...)[1])
    leaves = jax.tree.leaves_with_path(state)
    if any(not hasattr(key, "key") for path, _ in leaves for key in path):
        raise WeightsError(
            "this model's experts are laid out for generating, so they are not weights any more; write the "
            "model that it was made of."
        )
    arrays = {names_of(path): array for path, array in leaves}
    for path, array in arrays.items():
        if not array.is_fully_addressable:
            raise WeightsError(
                f"{'.'.join(path)} is spread over several processes; load the model in one to write it."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise WeightsError(
                f"{'.'.join(path)} is {array.dtype}; write the model as it was before it was quantized."
            )
    return arrays


def tensors_of(
    weights: list[Weight],
    arrays: Mapping[Names, Array],
    dtype: np.dtype | None,
    *,
    stacked: bool,
    copies: Mapping[str, str],
) -> list[ToWrite]:
    """Order what has to be written by its names, each tensor with the pieces of our weights it is made of.

    `dtype` is that of all, or each weight's own if None. `copies` are names under which a tensor is written a
    second time.
    """
    parts: dict[str, list[tuple[Piece, Array]]] = {}
    for weight in weights:
        for piece in weight.ways[-1 if stacked else 0]:
            parts.setdefault(piece.name, []).append((piece, arrays[weight.path]))
    for name, original in copies.items():
        if name not in parts:
            parts[name] = [(piece._replace(name=name), array) for piece, array in parts[original]]

    def pieces(name: str) -> Iterator[np.ndarray]:
        for piece, array in sorted(parts[name], key=lambda one: one[0].at):
            yield turn_back(_entry(array, piece.index), piece)

    return [
        ToWrite(
            name,
            parts[name][0][0].tensor,
            np.dtype(dtype or parts[name][0][1].dtype),
            functools.partial(pieces, name),
        )
        for name in sorted(parts, key=_in_order)
    ]


def _entry(array: Array, index: tuple[int, ...]) -> np.ndarray:
    """Bring one entry of the leading dimensions to the host; where it is there already, without a copy."""
    if len(array.sharding.device_set) == 1 and next(iter(array.devices())).platform == "cpu":
        return np.asarray(array)[index]
    return np.asarray(array[index] if index else array)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort names with numbers by the numbers."""
    return [
        (int("".join(run)), "") if digits else (-1, "".join(run))
        for digits, run in ((key, list(group)) for key, group in itertools.groupby(name, str.isdigit))
    ]
