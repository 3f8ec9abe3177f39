"""Which devices take part in a collective, as the compiler writes it, and which mesh axes they span."""

import functools
import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_GROUPS = re.compile(
    r"\breplica_groups=(\{\{.*?\}\}|\{\s*\}|maximal_mesh\S*|"
    r"mesh\[[^\]]*\](?:,\s*device_ids=\((?:[^()]|\([^()]*\))*\))?\s*\{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
_PAIRS = re.compile(r"\bsource_target_pairs=(\{\{.*?\}\}|\{\s*\})")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*)\))?\s*\{([^}]*)\}$")
_PERMUTED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")


def read_groups(attributes: str, devices: int | None) -> Groups:
    """The groups of devices that a collective's attributes name, as places in the program's device order.

    A permutation's groups are the devices that its pairs connect. `{}` is all `devices` in one group.

    Raises:
      ValueError: the attributes name no groups, or in a form that is not known.
    """
    if pairs := _PAIRS.search(attributes):
        return _connected(_lists(pairs[1]))
    found = _GROUPS.search(attributes)
    if found is None:
        raise ValueError(f"No replica_groups or source_target_pairs can be read in {attributes[:200]!r}.")
    return _read(re.sub(r"\s", "", found[1]), devices)


@functools.lru_cache(maxsize=256)
def _read(text: str, devices: int | None) -> Groups:
    if text == "{}":
        if devices is None:
            raise ValueError("replica_groups={} means all devices, but the program does not say how many.")
        return (tuple(range(devices)),)
    if text.startswith("{"):
        return _lists(text)
    if iota := _IOTA.match(text):
        places = _permuted(_numbers(iota[2]), iota[3])
        return _rows(places.reshape(_numbers(iota[1])))
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"replica_groups={text} is in a form that is not known.")


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`: a mesh over the devices, and the axes that a group spans.

    `'b':(2)2` is a part of an axis: b is split into [2, 2, rest], and the second of these is meant. An order
    of devices other than 0, 1, 2... is a list or a transposed count, `device_ids=([4,2]T(1,0))`.
    """
    sizes = {name.strip("'"): int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    wanted = [found.groups() for found in _AXIS.finditer(grouped)]
    dims, group_dims = [], {}
    for name, size in sizes.items():
        parts = sorted((int(before), int(part)) for n, before, part in wanted if n == name and before)
        done = 1
        for before, part in parts:
            dims += [before // done] if before > done else []
            group_dims[(name, str(before))] = len(dims)
            dims.append(part)
            done = before * part
        if not parts:
            group_dims[(name, None)] = len(dims)
        dims.append(size // done)
    count = math.prod(sizes.values())
    if device_ids and (permuted := _PERMUTED.match(device_ids)):
        places = _permuted(_numbers(permuted[1]), permuted[2])
    else:
        places = np.array(_numbers(device_ids)) if device_ids else np.arange(count)
    last = [group_dims[name, before] for name, before, _ in wanted]
    rest = [dim for dim in range(len(dims)) if dim not in last]
    places = places.reshape(dims).transpose([*rest, *last])
    return _rows(places.reshape(-1, math.prod(dims[dim] for dim in last)))


def spanned_axes(groups: Groups, shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which two devices of one group differ, in the mesh's order.

    `shape` is the mesh's axis sizes by name. A place in the program's device order is a place in the mesh's
    devices, row by row.
    """
    return _spanned_axes(groups, tuple(shape.items()))


@functools.lru_cache(maxsize=256)
def _spanned_axes(groups: Groups, shape: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    sizes = [size for _, size in shape]
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), sizes))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for (name, _), spans in zip(shape, differ, strict=True) if spans)


def _connected(pairs: Groups) -> Groups:
    """Devices joined by pairs (source, target), directly or through others."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = group_of.get(source, {source}) | group_of.get(target, {target})
        group_of.update(dict.fromkeys(joined, joined))
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def _lists(text: str) -> Groups:
    return tuple(_numbers(row) for row in re.findall(r"\{([\d,\s]+)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _permuted(dims: tuple[int, ...], order: str | None) -> np.ndarray:
    """0, 1, 2... in the shape `dims`, transposed."""
    places = np.arange(math.prod(dims)).reshape(dims)
    return places.transpose(_numbers(order)) if order else places


def _rows(places: np.ndarray) -> Groups:
    return tuple(tuple(int(place) for place in row) for row in places)
