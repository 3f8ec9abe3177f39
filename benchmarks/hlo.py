"""Count what a compiled program does from its text: products, kernels, and the largest array."""

import json
import math
import re

_SHAPE = re.compile(r"\b(?:pred|bf16|f16|f32|f64|[su](?:4|8|16|32|64))\[([\d,]+)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \(?\w+\[([\d,]*)\].*? ([\w-]+)\(%?([\w.-]+)?")
_DOT_CONTRACTS = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM_CONTRACTS = re.compile(r'"lhs_contracting_dimensions":(\[[^\]]*\])')
# How a Pallas kernel is called: on TPU, and on a GPU by way of Mosaic and of Triton.
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")


def products(text: str) -> list[int]:
    """Return the FLOPs of each matrix product that XLA runs itself, in a fusion or as a library call.

    A product inside a loop is counted once. Products in kernels are not in the text.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    flops = []
    for line in text.splitlines():
        if not (match := _OPERATION.match(line)):
            continue
        name, dimensions, operation, operand = match.groups()
        shapes[name] = _numbers(dimensions)
        contracts = None
        if operation == "dot" and (found := _DOT_CONTRACTS.search(line)):
            contracts = _numbers(found[1])
        elif operation == "custom-call" and (found := _GEMM_CONTRACTS.search(line)):
            contracts = tuple(int(number) for number in json.loads(found[1]))
        if contracts is not None:
            inner = [shapes[operand][dimension] for dimension in contracts]
            flops.append(2 * math.prod(shapes[name]) * math.prod(inner))
    return flops


def kernels(text: str) -> int:
    """Count the calls of Pallas kernels."""
    return sum(text.count(f'custom_call_target="{name}') for name in _KERNELS)


def largest_array(text: str) -> int:
    """Return the number of elements of the largest array in the program, inputs and results included."""
    return max((math.prod(_numbers(found)) for found in _SHAPE.findall(text)), default=0)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
