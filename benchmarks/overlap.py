"""What a compiled program does while an all-to-all is under way, read in the order the compiler gave it."""

import math
import re
from typing import NamedTuple

from switchmoe.parallel.hlo import Computation, Instruction, Module, operand_name, operand_shape, read_module

_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")
_LABELS = re.compile(r"\bdim_labels=\w+_(\w+)->\w+")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")


class Span(NamedTuple):
    """One all-to-all, from where it starts to where its result is waited for.

    Attributes:
      name: the instruction that starts it, or does all of it.
      op_name: where it comes from.
      starts_early: False if it starts and ends in one place, with nothing beside it.
      products: FLOPs of each matrix product in between.
    """

    name: str
    op_name: str
    starts_early: bool
    products: tuple[int, ...]


def all_to_alls(text: str) -> list[Span]:
    """List a program's all-to-alls, each with the products that its device does meanwhile.

    Raises:
      ValueError: the text is not a compiled program's, or its lines are not in the order they run in.
    """
    if "is_scheduled=true" not in text.lstrip().split("\n", 1)[0]:
        raise ValueError("The program is not scheduled, so the order of its lines means nothing; compile it.")
    module = read_module(text)
    return [span for computation in module.computations.values() for span in _spans(module, computation)]


def _spans(module: Module, computation: Computation) -> list[Span]:
    if not any("all-to-all" in line for line in computation.lines.values()):
        return []
    found, under_way = [], {}
    for name in computation.lines:
        line = computation.get(name)
        assert line is not None
        if line.opcode == "all-to-all":
            found.append(Span(name, line.op_name, False, ()))
        elif line.opcode == "all-to-all-start":
            under_way[name] = (line.op_name, [])
        elif line.opcode == "all-to-all-done":
            started = operand_name(line.operands[0])
            op_name, products = under_way.pop(started)
            found.append(Span(started, op_name, True, tuple(products)))
        else:
            products = product_flops(module, computation, line) if under_way else []
            for _, meanwhile in under_way.values():
                meanwhile.extend(products)
    return found


def product_flops(module: Module, computation: Computation, line: Instruction) -> list[int]:
    """Return the FLOPs of each matrix product of an instruction, in the fusions that it calls as well.

    XLA:TPU writes products as convolutions. A batch becomes a dilated dimension of space, of which a place of
    the result sees one place only; places in any other window are summed over.
    """
    if called := _CALLED.search(line.attributes):
        inside = module.computations.get(called[1], Computation(""))
        lines = [inside.get(name) for name in inside.lines]
        return [flops for made in lines if made for flops in product_flops(module, inside, made)]
    if line.opcode == "convolution" and (labels := _LABELS.search(line.attributes)):
        summed = operand_shape(computation, line.operands[1]).dims[labels[1].index("i")]
        window = _WINDOW.search(line.attributes)
        settings = dict(setting.split("=") for setting in window[1].split()) if window else {}
        sizes = settings.get("size", "1").split("x")
        dilated = settings.get("lhs_dilate", "x".join("1" for _ in sizes)).split("x")
        summed *= math.prod(int(size) for size, by in zip(sizes, dilated, strict=True) if by == "1")
    elif line.opcode == "dot" and (dims := _CONTRACTED.search(line.attributes)):
        lhs = operand_shape(computation, line.operands[0]).dims
        summed = math.prod(lhs[int(dim)] for dim in dims[1].split(",") if dim)
    else:
        return []
    result = operand_shape(Computation("", computation.lines), f"%{line.name}")
    return [2 * math.prod(result.dims) * summed]
