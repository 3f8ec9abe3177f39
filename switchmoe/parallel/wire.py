"""What a compiled program sends between devices: every collective, how large, over which axes, how often."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh
from jax.stages import Compiled

from switchmoe.parallel.hlo import (
    ArrayShape,
    Computation,
    Instruction,
    Module,
    operand_name,
    operand_shape,
    read_module,
)
from switchmoe.parallel.hlo_times import Times, times_run
from switchmoe.parallel.replica_groups import read_groups, spanned_axes

KINDS = (
    "ragged-all-to-all",
    "all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "collective-broadcast",
)
_KIND = re.compile(rf"\b({'|'.join(KINDS)})(?:-start)?\(")
_CHAIN = re.compile(r'chain_id="(\d+)"')


class Collective(NamedTuple):
    """One array that one device gives to a collective.

    Attributes:
      kind: a name in `KINDS`.
      dtype: of the array, as the compiler names it ("f32", "bf16", "s32", "pred").
      shape: of the array on one device. Where the compiler cuts it into one piece a device (all-to-all on
        CPU), the number of pieces comes first.
      devices: how many devices are in a group.
      axes: the mesh axes along which the devices of a group differ, in the mesh's order; None without a mesh.
      times: how often it runs in one run of the program.
      times_known: False where `times` leaves out a loop of unknown length, or counts a branch that may not
        be taken.
      op_name: where it comes from, such as "jit(step)/transpose(jvp())/moe/all_to_all".
      name: the instruction's name in the program. The operands of one instruction share it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    axes: tuple[str, ...] | None
    times: int
    times_known: bool
    op_name: str
    name: str

    @property
    def bytes(self) -> int:
        """Bytes of the array on one device."""
        return ArrayShape(self.dtype, self.shape).bytes

    @property
    def wire_bytes(self) -> int:
        """Bytes that one device sends each time, by the ring algorithms (or direct sends, for all-to-all).

        Of n devices and an array of b bytes: all-to-all and reduce-scatter b(n-1)/n; all-gather, whose array
        is one device's part, b(n-1); all-reduce, which is one after the other, 2b(n-1)/n; a permutation and a
        broadcast b. A ragged all-to-all is counted as if every device got an equal share: the program does
        not say how many rows go. (Thakur, Rabenseifner & Gropp 2005, https://doi.org/10.1177/1094342005051521.)
        """
        others = self.devices - 1
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes * (others > 0)
        if self.kind == "all-gather":
            return self.bytes * others
        return -(-(2 if self.kind == "all-reduce" else 1) * self.bytes * others // self.devices)

    @property
    def total_wire_bytes(self) -> int:
        """Bytes that one device sends in one run of the program: `wire_bytes` as often as it runs."""
        return self.wire_bytes * self.times

    def __str__(self) -> str:
        axes = "unknown axes" if self.axes is None else "(" + ", ".join(self.axes) + ")"
        array = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        times = f"{self.times}{'' if self.times_known else '?'} x {self.wire_bytes:,} bytes"
        return f"{self.kind} of {array} over {axes}, {self.devices} devices, {times}: {self.op_name}"


def collectives(compiled: Compiled | str, mesh: Mesh | AbstractMesh | None = None) -> list[Collective]:
    """List what a compiled program sends between devices, one entry for each array given to a collective.

    XLA merges many small all-reduces into one instruction: each of its arrays is an entry. A collective that
    is split into a start and an end is counted once. What is counted is what the compiler made for this
    platform, and another's may differ: XLA:CPU sends bf16 as f32, and writes an all-reduce and a slice where
    XLA:TPU scatters.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.
      mesh: the mesh that the program was compiled for, to name the axes.

    Raises:
      ValueError: the text is not that of a compiled program, or `mesh` has another number of devices.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if text is None:
        raise ValueError("This platform does not show its compiled programs; read one for another platform.")
    module = read_module(text)
    if mesh is not None and module.devices not in (None, mesh.size):
        raise ValueError(
            f"The program is for {module.devices} devices, but mesh has {mesh.size}; "
            "pass the mesh that it was compiled for."
        )
    shape = None if mesh is None else dict(mesh.shape)
    entries, seen_chains = [], set()
    for name, times in times_run(module).items():
        computation = module.computations[name]
        for key, line in computation.lines.items():
            if not _KIND.search(line):
                continue
            instruction = computation.get(key)
            assert instruction is not None
            # On TPU a collective that runs beside other work is printed once for each stretch of that work.
            chain = _CHAIN.search(line) if "async_collective_fusion_config" in line else None
            if chain and chain[1] in seen_chains:
                continue
            seen_chains.update([chain[1]] if chain else [])
            entries += _entries(module, computation, instruction, times, shape)
    return entries


def _entries(
    module: Module, computation: Computation, line: Instruction, times: Times, shape: dict[str, int] | None
) -> list[Collective]:
    found = _KIND.match(line.opcode + "(")
    if found is None:
        return []
    kind = found[1]
    arrays = [operand_shape(computation, operand) for operand in line.operands]
    if kind == "ragged-all-to-all":
        # Rows to send, and the array they are put into: the smaller one has no room beyond what there is.
        arrays = [min(arrays[:2], key=lambda array: math.prod(array.dims))]
    names = [_op_name(module, computation, line, i) for i in range(len(arrays))]
    if kind == "all-to-all" and "dimensions=" not in line.attributes:
        # One piece a device: together they are the one array that the program meant.
        arrays, names = [ArrayShape(arrays[0].dtype, (len(arrays), *arrays[0].dims))], [line.op_name]
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU's way of writing it: an all-reduce fused with the slice that is kept.
    groups = read_groups(line.attributes, module.devices)
    axes = None if shape is None else spanned_axes(groups, shape)
    size = max((len(group) for group in groups), default=1)
    return [
        Collective(kind, array.dtype, array.dims, size, axes, times.count, times.known, name, line.name)
        for array, name in zip(arrays, names, strict=True)
    ]


def _op_name(module: Module, computation: Computation, line: Instruction, index: int) -> str:
    """Where one operand of a collective comes from; a merged one's own name lists all its operands."""
    if len(line.operands) > 1 and line.type.startswith("("):
        taken = re.compile(rf"get-tuple-element\(\S*\s*%?{re.escape(line.name)}\), index={index}\b")
        for key, text in computation.lines.items():
            if taken.search(text) and (result := computation.get(key)) and result.op_name:
                return result.op_name
        made = computation.get(operand_name(line.operands[index]))
        if made is not None and made.op_name:
            return made.op_name
    return line.op_name or _caller_op_name(module, computation.name)


def _caller_op_name(module: Module, name: str) -> str:
    """Inside a fusion the compiler may drop the names; the fusion itself keeps one."""
    for caller in module.computations.values():
        for key, text in caller.lines.items():
            if f"calls=%{name}," in text and (made := caller.get(key)):
                return made.op_name
    return ""


def wire_table(entries: Iterable[Collective]) -> str:
    """Write the totals of each kind and its axes: the bytes that one device sends in one run."""
    totals: dict[tuple[str, str, int], list[int]] = {}
    for entry in entries:
        axes = "?" if entry.axes is None else ", ".join(entry.axes)
        row = totals.setdefault((entry.kind, axes, entry.devices), [0, 0, 0])
        row[0] += 1
        row[1] += entry.times
        row[2] += entry.total_wire_bytes
    rows = [("collective", "axes", "devices", "arrays", "runs", "bytes sent")]
    for (kind, axes, devices), (arrays, runs, sent) in sorted(totals.items(), key=lambda row: -row[1][2]):
        rows.append((kind, axes, f"{devices}", f"{arrays}", f"{runs}", f"{sent:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
