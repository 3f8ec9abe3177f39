"""How often each computation of a compiled program runs: loops multiply, branches are counted as taken."""

import re
from typing import NamedTuple

from switchmoe.parallel.hlo import Computation, Instruction, Module, operand_name

_CALLEE = re.compile(
    r"\b(body|condition|to_apply|calls|called_computations|branch_computations|true_computation|"
    r"false_computation)=(\{[^{}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count\\?"?\s*[:=]\s*\{\s*\\?"?n\\?"?\s*[:=]\s*\\?"?(\d+)')
_SKIPPED = ("async-update", "async-done")


class Times(NamedTuple):
    """How often a computation runs in one run of the program.

    `known` is False where a loop does not say how often it turns (it is counted as one turn) and where a
    branch may not be taken (it is counted as taken).
    """

    count: int
    known: bool


def times_run(module: Module) -> dict[str, Times]:
    """Count the runs of each computation that the program can reach."""
    callers: dict[str, list[tuple[str, Times]]] = {}
    for caller in module.computations.values():
        for name, line in caller.lines.items():
            if "=" not in line or not _CALLEE.search(line):
                continue
            for callee, factor in _calls(module, caller, name):
                callers.setdefault(callee, []).append((caller.name, factor))
    runs = {module.entry: Times(1, True)}

    def count(name: str) -> Times:
        if name not in runs:
            runs[name] = Times(0, True)
            parts = [(count(caller), factor) for caller, factor in callers.get(name, [])]
            parts = [(times, factor) for times, factor in parts if times.count]
            total = sum(times.count * factor.count for times, factor in parts)
            runs[name] = Times(total, all(times.known and factor.known for times, factor in parts))
        return runs[name]

    return {name: count(name) for name in module.computations if count(name).count}


def _calls(module: Module, caller: Computation, name: str) -> list[tuple[str, Times]]:
    """The computations that an instruction calls, and how often one run of it runs each."""
    instruction = caller.get(name)
    if instruction is None or instruction.opcode in _SKIPPED:
        return []  # These name the computation that async-start has already called.
    if instruction.opcode.endswith("-start") and instruction.opcode != "async-start":
        return []  # all-reduce-start and its like stand for the collective themselves.
    found = []
    for attribute, names in _CALLEE.findall(instruction.attributes):
        callees = [part.strip(" %") for part in names.strip("{}").split(",")]
        found += [(attribute, callee) for callee in callees if callee in module.computations]
    if instruction.opcode == "while":
        trips = _trip_count(module, caller, instruction, dict(found))
        turns = trips or Times(1, False)
        return [(callee, _add(turns, attribute == "condition")) for attribute, callee in found]
    # A single branch, as of a choice between platforms, is sure to be taken.
    sure = instruction.opcode != "conditional" or len(found) == 1
    return [(callee, Times(1, sure)) for _, callee in found]


def _add(turns: Times, condition: bool) -> Times:
    # The condition is asked once more than the body runs.
    return Times(turns.count + condition, turns.known)


def _trip_count(
    module: Module, caller: Computation, loop: Instruction, callees: dict[str, str]
) -> Times | None:
    """The turns of a loop: as the compiler notes them, else (on TPU) from a counter of jax's own form.

    That form is `i < limit` with constant start, limit and step.
    """
    if noted := _TRIPS.search(loop.attributes):
        return Times(int(noted[1]), True)
    condition = module.computations.get(callees.get("condition", ""))
    body = module.computations.get(callees.get("body", ""))
    start = caller.get(operand_name(loop.operands[0])) if loop.operands else None
    if condition is None or body is None or start is None or start.opcode != "tuple":
        return None
    test = condition.get(condition.root)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None

    def constant(computation: Computation, operand: str) -> int | None:
        made = _origin(computation, operand)
        if made is not None and made.opcode == "constant":
            return int(made.arguments) if made.arguments.strip().lstrip("-").isdigit() else None
        index = _tuple_index(computation, made)
        # The compiler hands constants to a loop through its tuple.
        return None if index is None or computation is caller else constant(caller, start.operands[index])

    counter = _tuple_index(condition, _origin(condition, test.operands[0]))
    result = body.get(body.root)
    if counter is None or result is None or result.opcode != "tuple":
        return None
    step = _origin(body, result.operands[counter])
    if step is None or step.opcode != "add":
        return None
    if _tuple_index(body, _origin(body, step.operands[0])) != counter:
        return None
    first, limit = constant(caller, start.operands[counter]), constant(condition, test.operands[1])
    by = constant(body, step.operands[1])
    if first is None or limit is None or not by or by < 0:
        return None
    return Times(max(0, -(-(limit - first) // by)), True)


def _origin(computation: Computation, operand: str) -> Instruction | None:
    """The instruction behind an operand, past mere copies."""
    made = computation.get(operand_name(operand))
    while made is not None and made.opcode in ("copy", "bitcast", "convert"):
        made = computation.get(operand_name(made.operands[0]))
    return made


def _tuple_index(computation: Computation, made: Instruction | None) -> int | None:
    """Which element of the computation's own argument an instruction takes, if it does."""
    if made is None or made.opcode != "get-tuple-element":
        return None
    whole, index = _origin(computation, made.operands[0]), re.search(r"index=(\d+)", made.attributes)
    return int(index[1]) if index and whole is not None and whole.opcode == "parameter" else None
