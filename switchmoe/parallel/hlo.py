"""The text of a compiled program (HLO), read as far as counting its collectives needs.

Lines are kept as they are and taken apart only when asked for: a training step has tens of thousands. The
grammar is that of XLA's printer (https://openxla.org/xla/operation_semantics); CPU, GPU and TPU use it alike.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_HEADER = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)[^=]*\{\s*$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\]")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_BRACKETS = re.compile(r"[(){}\[\]]")


class ArrayShape(NamedTuple):
    """An array as the compiler names it: `dtype` is "f32", "bf16", "s32", "pred" and so on."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the array on one device; types below 8 bits are packed, `pred` takes a byte."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = int(digits[1]) if digits else 8 * (self.dtype == "pred")
        return -(-math.prod(self.dims) * bits // 8)


class Instruction(NamedTuple):
    """One line of a computation: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Where in the user's program the line comes from, or ""."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass
class Computation:
    """A function of the program: its lines by the name of their result, in the order printed."""

    name: str
    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def _parsed(self) -> dict[str, Instruction]:
        return {}

    def get(self, name: str) -> Instruction | None:
        """The instruction that makes `name`, or None if there is none."""
        if name not in self._parsed:
            if name not in self.lines:
                return None
            self._parsed[name] = _read_instruction(name, self.lines[name])
        return self._parsed[name]


class Module(NamedTuple):
    """A whole program: its computations by name, the one that runs first, and the devices it is for."""

    computations: dict[str, Computation]
    entry: str
    devices: int | None


def read_module(text: str) -> Module:
    """Read the text of a compiled program. `devices` is None where its first line does not say.

    Raises:
      ValueError: the text has no ENTRY computation, so it is not a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if "/*" in line:
            line = _COMMENT.sub("", line)
        if current is not None and (found := _INSTRUCTION.match(line)):
            current.lines[found[2]] = found[3]
            current.root = found[2] if found[1] else current.root
        elif line.endswith("{") and not line.startswith("HloModule") and (found := _HEADER.match(line)):
            current = computations[found[2]] = Computation(found[2])
            entry = found[2] if found[1] else entry
        elif line.lstrip().startswith("}"):
            current = None
    if not entry:
        raise ValueError(
            "This is not the text of a compiled program: it has no ENTRY computation; "
            "pass jax.jit(f).lower(...).compile(), or its as_text()."
        )
    first_line = text.lstrip().split("\n", 1)[0]
    counts = [int(count) for count in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first_line)]
    return Module(computations, entry, math.prod(counts) if counts else None)


def array_shapes(type_text: str) -> list[ArrayShape]:
    """The arrays in a type: one for `f32[4,8]{1,0}`, several for a tuple; `token[]` is none."""
    return [
        ArrayShape(dtype, tuple(int(dim.strip(" <=")) for dim in dims.split(",") if dim.strip()))
        for dtype, dims in _SHAPE.findall(type_text)
        if dtype != "token"
    ]


def operand_shape(computation: Computation, operand: str) -> ArrayShape:
    """The array that an operand names: from the line that makes it, else from the type beside its name."""
    made = computation.get(operand_name(operand))
    shapes = array_shapes(made.type if made else operand)
    if len(shapes) != 1:
        raise ValueError(f"Operand {operand!r} of {computation.name!r} is not one array; is the text whole?")
    return shapes[0]


def operand_name(operand: str) -> str:
    """`f32[4]{0} %x.1` and `%x.1` both name `x.1`."""
    return operand.split()[-1].lstrip("%") if operand.split() else ""


def _read_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        return Instruction(name, text, "", (), "", "")
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close]
    return Instruction(name, text[:end], opcode[1], _split(arguments), arguments, text[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for found in _BRACKETS.finditer(text, start):
        depth += 1 if found[0] in "([{" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _split(arguments: str) -> tuple[str, ...]:
    """Split at the commas that stand in no bracket."""
    parts, depth, last = [], 0, 0
    for found in re.finditer(r"[(){}\[\],]", arguments):
        if found[0] == ",":
            if depth == 0:
                parts.append(arguments[last : found.start()].strip())
                last = found.end()
        else:
            depth += 1 if found[0] in "([{" else -1
    return tuple(part for part in (*parts, arguments[last:].strip()) if part)
