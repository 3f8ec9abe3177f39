"""Where the tokens of a model went, kept in a file, so that another pass can be held to the same routing."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from switchmoe.shapes import Array, Bool, Float, Int

_FORMAT = 1


class RouterTrace(NamedTuple):
    """Where every token went in every sparse layer: (layer, token, expert, weight), a token by row and place.

    Recorded by `TransformerLM.trace`, and replayed by passing `expert_LBSK` as `replay=` to a forward pass.
    That fixes the choices alone: weights are computed again, so that the router keeps its gradient, and seats
    are given out again, by the rules of that pass. A plain layer's `switchmoe.layer.Trace` of rows [B, S]
    becomes a trace of one layer by `RouterTrace(*(part[None] for part in trace))`.

    Attributes:
      expert_LBSK: the experts each token chose, best first; E where a choice is not used.
      weight_LBSK: the weight of each choice.
      kept_LBSK: whether the choice got a seat; False at padding.
    """

    expert_LBSK: Int[Array, "L B S K"]
    weight_LBSK: Float[Array, "L B S K"]
    kept_LBSK: Bool[Array, "L B S K"]


def save_trace(path: str | Path, trace: RouterTrace, *, num_experts: int) -> None:
    """Write where tokens went to one .npz file, all at once: a kill leaves the old file or the new one.

    Experts become int16 where that holds `num_experts`, else int32; weights are float32.

    Raises:
      ValueError: the trace names an expert beyond `num_experts` (that number itself is a choice not used), or
        its parts have different shapes.
    """
    expert_LBSK, weight_LBSK, kept_LBSK = (np.asarray(part) for part in trace)
    if expert_LBSK.ndim != 4 or not expert_LBSK.shape == weight_LBSK.shape == kept_LBSK.shape:
        shapes = ", ".join(str(np.shape(part)) for part in trace)
        raise ValueError(
            f"The parts of the trace have shapes {shapes}, but all must be [layers, rows, places, choices]."
        )
    _check_experts(expert_LBSK, num_experts)
    narrow = np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "wb") as file:  # numpy would add .npz to a path without it
        np.savez_compressed(
            file,
            format=np.int32(_FORMAT),
            num_experts=np.int32(num_experts),
            expert_LBSK=expert_LBSK.astype(narrow),
            weight_LBSK=weight_LBSK.astype(np.float32),
            kept_LBSK=kept_LBSK.astype(bool),
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_trace(
    path: str | Path, *, num_experts: int | None = None, shape: tuple[int, ...] | None = None
) -> RouterTrace:
    """Read where tokens went from a file of `save_trace`.

    Args:
      path: the file.
      num_experts: experts a layer of the model that it shall be replayed in.
      shape: what `expert_LBSK` must have there, [layers, rows, positions, choices]; leave out to accept any.

    Raises:
      ValueError: one sentence, if the file is no trace, or one of another number of experts or another shape.
    """
    try:
        # Opened here, because numpy leaves a file that is no archive open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("format", "num_experts", *RouterTrace._fields)}
    except (
        KeyError,
        ValueError,
        OSError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{path} is not a router trace of switchmoe ({error}).") from None
    if arrays["format"] != _FORMAT:
        raise ValueError(
            f"{path} is a router trace of format {arrays['format']}, but this version reads {_FORMAT}."
        )
    experts = int(arrays["num_experts"])
    shapes = {arrays[name].shape for name in RouterTrace._fields}
    if len(shapes) != 1 or len(shapes.pop()) != 4:
        raise ValueError(f"{path} is not a router trace of switchmoe (its parts have different shapes).")
    trace = RouterTrace(*(jnp.asarray(arrays[name]) for name in RouterTrace._fields))
    if num_experts is not None and num_experts != experts:
        raise ValueError(
            f"{path} is a trace of layers with {experts} experts, but these have {num_experts}; "
            "replay it in the model it was recorded from."
        )
    if shape is not None and tuple(shape) != trace.expert_LBSK.shape:
        raise ValueError(
            f"{path} is a trace of [layers, rows, positions, choices] = {list(trace.expert_LBSK.shape)}, but "
            f"{list(shape)} is asked for; replay it over the rows it was recorded from."
        )
    _check_experts(arrays["expert_LBSK"], experts)
    return trace._replace(expert_LBSK=trace.expert_LBSK.astype(jnp.int32))


def _check_experts(expert_LBSK: np.ndarray, num_experts: int) -> None:
    if expert_LBSK.size and not 0 <= expert_LBSK.min() <= expert_LBSK.max() <= num_experts:
        raise ValueError(
            f"The trace names experts {expert_LBSK.min()} to {expert_LBSK.max()}, but num_experts is "
            f"{num_experts}; pass the number of experts of its model."
        )
