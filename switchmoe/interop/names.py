"""Which part of which tensor in a file is which part of which weight of ours, worked out from tables.

A table has a line for each kind of weight: our name for it, theirs, and how their dimensions become ours, in
the words of einops. Dimensions of one weight, theirs and ours: v vocabulary, d model features, h heads, a
features of a head, f hidden features, e experts, u buckets of distances.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from switchmoe.interop.errors import WeightsError
from switchmoe.interop.source import Source
from switchmoe.models import LMConfig

Names = tuple[str, ...]
_PLACE = re.compile(r"(layer|block)_(\d+)")
# How many shapes a message names before it says how many more there are.
_FEW = 3


class Named(NamedTuple):
    """A line of a table of names.

    Attributes:
      theirs: their name, with {layer} and {expert} for numbers; "" where experts only come stacked.
      axes: their dimensions -> ours, without layers, and without experts where each has a tensor of its own.
      stacked: their name for all experts of a layer in one tensor, or "".
      part: which of the `parts` equal parts of that tensor's second dimension the weight is.
      parts: see there.
      also: another name of theirs.
    """

    theirs: str
    axes: str
    stacked: str = ""
    part: int = 0
    parts: int = 1
    also: str = ""


class Piece(NamedTuple):
    """A tensor in a file or a part of one, which is one entry of our weight's leading dimensions.

    Attributes:
      name: of the tensor.
      tensor: its shape.
      at: the expert in it and the first of its rows, where the tensor has all experts; else ().
      shape: of the piece.
      axes: its dimensions -> those of our weight that are not leading.
      index: the place in the leading dimensions (super-block, then expert) of our weight.
    """

    name: str
    tensor: tuple[int, ...]
    at: tuple[int, int] | tuple[()]
    shape: tuple[int, ...]
    axes: str
    index: tuple[int, ...]


class Weight(NamedTuple):
    """One of our weights, and the ways in which a file may hold it: the pieces of each of them."""

    path: Names
    shape: tuple[int, ...]
    ways: list[list[Piece]]


def find_weights(config: LMConfig, table: Mapping[str, Named], shapes: Mapping[Names, Any]) -> list[Weight]:
    """List our weights with the tensors that may hold them.

    Args:
      config: of the model.
      table: by our name, "encoder." in front for the encoder's, without super-blocks and layers.
      shapes: of our weights by path, as arrays or descriptions of arrays.

    Raises:
      WeightsError: the table has no line for one of them.
    """
    weights = []
    for path, array in shapes.items():
        key, numbers = _split(path)
        if key not in table:
            raise WeightsError(
                f"this model has {'.'.join(path)}, for which that format has no name; choose another format, "
                "or a model without it."
            )
        every = (config.encoder if key.startswith("encoder.") else config).moe_every

        def layer_of(index: tuple[int, ...], numbers=numbers, every=every) -> int:
            block = numbers["block"] if "block" in numbers else index[0]
            return block * every + numbers.get("layer", 0)

        weights.append(Weight(path, tuple(array.shape), _ways(table[key], array.shape, layer_of)))
    return weights


def choose_pieces(
    weights: list[Weight], source: Source, copies: Mapping[str, str] = {}, noise: str = ""
) -> list[Weight]:
    """Keep of each weight the way in which the source holds it, and check every name and shape.

    Args:
      weights: from `find_weights`.
      source: what there is.
      copies: names that may be there too, by the tensor that they must equal, checked elsewhere.
      noise: a pattern of further names to pass over.

    Raises:
      WeightsError: a tensor is missing, left over or of another shape.
    """
    found, missing, misshapen, used = [], [], [], set()
    for weight in weights:
        best = max(weight.ways, key=lambda pieces: sum(piece.name in source.tensors for piece in pieces))
        found.append(weight._replace(ways=[best]))
        for piece in best:
            if piece.name in used:
                continue
            if piece.name not in source.tensors:
                missing.append(piece.name)
            elif source.tensors[piece.name].shape != piece.tensor:
                there = list(source.tensors[piece.name].shape)
                misshapen.append(f"{piece.name} has shape {there}, but needs {list(piece.tensor)}")
            used.add(piece.name)
    extra = [
        name
        for name in source.tensors
        if name not in used and name not in copies and not (noise and re.search(noise, name))
    ]
    if missing:
        raise WeightsError(f"{source.what} lacks {_few(missing)}; the configuration asks for it.")
    if misshapen:
        raise WeightsError(f"in {source.what} {_few(misshapen)}; weights and configuration do not fit.")
    if extra:
        raise WeightsError(
            f"{source.what} has {_few(sorted(extra))}, which the configuration does not ask for."
        )
    return found


def read_piece(source: Source, piece: Piece, part: tuple[slice, ...], whole: tuple[int, ...]) -> np.ndarray:
    """Read one piece, or as little of it as contains `part` of our dimensions, and turn it into those.

    `whole` is our shape without leading dimensions.
    """
    theirs, ours = parse_axes(piece.axes)
    sizes, wanted = dict(zip(ours, whole, strict=True)), dict(zip(ours, part, strict=True))
    rows = []
    for group in theirs:  # of joined dimensions, what the first asks for is read, the others are cut below
        inner = math.prod(sizes[name] for name in group[1:])
        first = wanted[group[0]]
        rows.append(slice(first.start * inner, first.stop * inner))
        sizes[group[0]], wanted[group[0]] = first.stop - first.start, slice(None)
    index: tuple[int | slice, ...] = tuple(rows)
    if piece.at:
        expert, row = piece.at
        index = (expert, slice(rows[0].start + row, rows[0].stop + row), *rows[1:])
    names = [name for group in theirs for name in group]
    values = source.read(piece.name, index).reshape([sizes[name] for name in names])
    return values.transpose([names.index(name) for name in ours])[tuple(wanted[name] for name in ours)]


def turn_back(values: np.ndarray, piece: Piece) -> np.ndarray:
    """Turn one entry of our weight into the piece of their tensor."""
    theirs, ours = parse_axes(piece.axes)
    names = [name for group in theirs for name in group]
    return values.transpose([ours.index(name) for name in names]).reshape(piece.shape)


def parse_axes(axes: str) -> tuple[list[list[str]], list[str]]:
    """Read "(h a) d -> d h a" as ([["h", "a"], ["d"]], ["d", "h", "a"])."""
    theirs, ours = axes.split(" -> ")
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", theirs)]
    return groups, ours.split()


def _split(path: Names) -> tuple[str, dict[str, int]]:
    """Part a path into the key of a table, and the numbers of super-block and layer that are in it."""
    places = {name: found for name in path if (found := _PLACE.fullmatch(name))}
    key = ".".join(name for name in path if name != "blocks" and name not in places)
    return key, {found.group(1): int(found.group(2)) for found in places.values()}


def _ways(
    named: Named, shape: tuple[int, ...], layer_of: Callable[[tuple[int, ...]], int]
) -> list[list[Piece]]:
    """Work out the pieces of a weight, for each of the ways in which a file may hold it."""
    theirs, ours = parse_axes(named.axes)
    leading, sizes = shape[: len(shape) - len(ours)], dict(zip(ours, shape[-len(ours) :], strict=True))
    piece_shape = tuple(math.prod(sizes[name] for name in group) for group in theirs)

    def pieces(template: str, all_experts: bool) -> list[Piece]:
        rows, *rest = piece_shape
        return [
            Piece(
                _fill_in(template, index, layer_of),
                (leading[-1], named.parts * rows, *rest) if all_experts else piece_shape,
                (index[-1], named.part * rows) if all_experts else (),
                piece_shape,
                named.axes,
                index,
            )
            for index in np.ndindex(leading)
        ]

    ways = [pieces(name, False) for name in (named.theirs, named.also) if name]
    return [*ways, pieces(named.stacked, True)] if named.stacked else ways


def _fill_in(template: str, index: tuple[int, ...], layer_of: Callable[[tuple[int, ...]], int]) -> str:
    if "{" not in template:
        return template
    return template.format(layer=layer_of(index), expert=index[-1] if index else None)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
