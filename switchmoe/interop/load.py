"""Hugging Face's weights -> a model of ours, a tensor or a part of one at a time."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax import nnx

from switchmoe.config import check_choice
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.families import read_family
from switchmoe.interop.names import Names, Weight, choose_pieces, find_weights, read_piece
from switchmoe.interop.source import SafetensorsFolder, Source
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.config import ComputeType
from switchmoe.nn import BalanceBias
from switchmoe.parallel import Layout, stored_as
from switchmoe.shapes import Array

# XLA takes over host memory as a CPU device's only where it begins at a multiple of so many bytes.
_ALIGNMENT = 64
# Rows of two tensors that are compared at a time.
_COMPARED = 1024


def from_hf(
    path: str | Path,
    *,
    dtype: ComputeType | None = None,
    layout: Layout | None = None,
    **changes: Any,
) -> TransformerLM:
    """Read config.json and safetensors of a folder as a model: `model(ids_BS)[0]` are its logits.

    Switch Transformers, Mixtral, OLMoE, Qwen3-MoE and Llama, in one file or in shards, experts one by one (as
    they are published) or stacked. Every name and shape is checked before any number is read. On the host
    there is never more than the model and two tensors; where devices have memory of their own, a weight
    stays there only until it is complete and was sent.

    Args:
      path: a folder on this machine.
      dtype: of weights and products; None keeps that of the file (float32 for float16). Routers stay float32.
      layout: how the model is stored on a mesh; each device then gets its part, and of experts that are split
        over devices no other part is read. None stores it on the first device.
      changes: settings of `LMConfig` to change, such as remat="full" or attention_implementation="cudnn".

    Raises:
      WeightsError: one sentence that names the file, the setting or the tensor that is in the way. Only
        safetensors is read; pickles are never opened.
    """
    if dtype is not None:
        check_choice("dtype", dtype, get_args(ComputeType))
    for name in changes:
        check_choice("the setting", name, [field.name for field in dataclasses.fields(LMConfig)])
    folder = Path(path).expanduser()
    family, config = read_family(folder)
    with SafetensorsFolder(folder) as source:
        kept = dtype or _dtype_of(source)
        config = dataclasses.replace(config, **({"dtype": kept, "param_dtype": kept} | changes))

        def find(leaves: Mapping[Names, Any]) -> list[Weight]:
            weights = find_weights(config, family.table, leaves)
            chosen = choose_pieces(weights, source, family.copies, family.noise)
            _refuse_other_copies(
                source, family.copies, {piece.name for one in chosen for piece in one.ways[0]}
            )
            return chosen

        return fill(config, source, layout, find)


def fill(
    config: LMConfig,
    source: Source,
    layout: Layout | None,
    find: Callable[[Mapping[Names, Any]], list[Weight]],
) -> TransformerLM:
    """Make a model of the weights in a source; `find` says where they are, given ours by their paths."""
    graph, state, _ = nnx.split(
        nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))), (nnx.Param, BalanceBias), ...
    )
    shapes = nnx.to_pure_dict(state)
    keys = {names_of(path): path for path, _ in jax.tree.leaves_with_path(shapes)}
    leaves = dict(zip(keys, jax.tree.leaves(shapes), strict=True))
    arrays = {}
    for weight in find(leaves):
        leaf = leaves[weight.path]
        place = _place(layout, keys[weight.path], leaf.ndim)
        arrays[weight.path] = _read_weight(weight, source, np.dtype(leaf.dtype), place)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in leaves]))


def names_of(path: tuple[Any, ...]) -> Names:
    """Read the names in the path of a nested dictionary's leaf."""
    return tuple(str(key.key) for key in path)


def _place(layout: Layout | None, path: tuple[Any, ...], ndim: int) -> jax.sharding.Sharding:
    if layout is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return layout.sharding(stored_as(layout, path, ndim))


def _read_weight(weight: Weight, source: Source, dtype: np.dtype, place: jax.sharding.Sharding) -> Array:
    """Read a weight part by part, each once, however many devices hold it."""
    parts: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(weight.shape).items():
        assert index is not None
        span = tuple(part.indices(size)[:2] for part, size in zip(index, weight.shape, strict=True))
        parts.setdefault(span, []).append(device)
    arrays = []
    for span, devices in parts.items():
        values = _read_part(weight, source, dtype, [slice(*bounds) for bounds in span])
        arrays += [jax.device_put(values, device) for device in devices]
        jax.block_until_ready(arrays)  # so that what a device copied does not stay on the host as well
    return jax.make_array_from_single_device_arrays(weight.shape, place, arrays)


def _read_part(weight: Weight, source: Source, dtype: np.dtype, part: list[slice]) -> np.ndarray:
    values = _empty(tuple(one.stop - one.start for one in part), dtype)
    pieces = {piece.index: piece for piece in weight.ways[0]}
    leading = len(next(iter(pieces)))
    inner, whole = tuple(part[leading:]), weight.shape[leading:]
    for index in itertools.product(*(range(one.start, one.stop) for one in part[:leading])):
        at = tuple(number - one.start for number, one in zip(index, part, strict=False))
        values[at] = read_piece(source, pieces[index], inner, whole)
    return values


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make room on the host that a CPU device takes over as it is, without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _dtype_of(source: Source) -> ComputeType:
    """Tell the type that keeps every number: bfloat16 if all weights are, else float32."""
    kinds = {stored.dtype.name for stored in source.tensors.values()}
    if "float64" in kinds:
        name = next(name for name, stored in source.tensors.items() if stored.dtype.name == "float64")
        raise WeightsError(
            f"{source.what} holds float64 numbers ({name}), which no model here keeps; pass dtype='float32'."
        )
    return "bfloat16" if kinds == {"bfloat16"} else "float32"


def _refuse_other_copies(source: Source, copies: Mapping[str, str], used: set[str]) -> None:
    """Raise a WeightsError if a tensor that should be another one's copy is not."""
    for name, original in copies.items():
        if name in used or name not in source.tensors or original not in source.tensors:
            continue
        there, here = source.tensors[name], source.tensors[original]
        same = there.shape == here.shape and all(
            np.array_equal(source.read(name, part), source.read(original, part))
            for start in range(0, here.shape[0], _COMPARED)
            for part in [(slice(start, min(start + _COMPARED, here.shape[0])),)]
        )
        if not same:
            raise WeightsError(
                f"{source.what} has a {name} that differs from {original}, but here they are one weight; "
                "use weights in which they are the same."
            )
