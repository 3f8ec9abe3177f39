"""What the compiled layer sends between devices, and what it does meanwhile, beside what it should."""

from collections import Counter
from typing import Any, NamedTuple

import switchmoe as sm
from switchmoe.parallel import Collective, collectives
from switchmoe.parallel.mesh import ExecutorName
from switchmoe.seats import expert_seats

if __package__:  # imported as benchmarks.transfers
    from benchmarks import hlo, overlap
else:  # beside a script, which finds its neighbours by their own names
    import hlo
    import overlap

ROWS, TOKENS, EXPERTS, D_MODEL, D_FF = 32, 1024, 64, 1024, 4096
LARGE = 1_000_000  # bytes: tokens are more, sums of routing, the router's gradient and plans are less
KERNELS = 6  # of the two products of a dropless layer and the four of their gradients


class Program(NamedTuple):
    """A layer to compile: the way its tokens travel, and whether all-to-alls may start early."""

    executor: ExecutorName
    chunks: int = 1
    early: bool = False

    @property
    def config(self) -> sm.MoEConfig:
        dispatch = "dropless" if self.dropless else "gather"
        return sm.MoEConfig(d_model=D_MODEL, d_ff=D_FF, num_experts=EXPERTS, dispatch=dispatch)

    @property
    def dropless(self) -> bool:
        return self.executor == "ragged_all_to_all"

    def __str__(self) -> str:
        chunks = f", chunks={self.chunks}" if self.chunks > 1 else ""
        return f"{self.executor}{chunks}{', early' if self.early else ''}"


def count_seats(program: Program, groups: int) -> int:
    """Count the seats of all experts in so many groups."""
    return EXPERTS * groups * expert_seats(program.config, tokens=TOKENS, train=True)


def expected(program: Program, n: int) -> tuple[dict[str, int], int]:
    """Say which collectives carry tokens, how many, and how many bytes these send a device and direction."""
    groups = ROWS // n
    sent, kinds = groups * TOKENS, ("ragged-all-to-all",)
    if program.executor == "all_to_all":
        sent, kinds = count_seats(program, groups), ("all-to-all",)
    elif program.executor == "all_gather":
        sent, kinds = n * sent, ("all-gather", "reduce-scatter")
    numbers = {kind: 4 * program.chunks // len(kinds) for kind in kinds}
    return numbers, 2 * sent * D_MODEL * 2 * (n - 1) // n


def read(text: str, program: Program, mesh: Any) -> dict[str, Any]:
    """Read the text of a compiled program for a mesh; bytes are those that one device sends."""
    entries = collectives(text, mesh)
    large = [entry for entry in entries if entry.bytes >= LARGE]
    small = [entry for entry in entries if entry.bytes < LARGE]
    numbers, formula = expected(program, mesh.size)
    sent = Counter()
    for entry in entries:
        sent[entry.kind] += entry.total_wire_bytes
    return {
        "kernels": hlo.kernels(text),
        "collectives": Counter(entry.kind for entry in entries),
        "bytes_by_kind": sent,
        "of_tokens": Counter(entry.kind for entry in large),
        "of_tokens_expected": numbers,
        "forward_bytes": sum(entry.total_wire_bytes for entry in large if not is_backward(entry)),
        "backward_bytes": sum(entry.total_wire_bytes for entry in large if is_backward(entry)),
        "formula_bytes": formula,
        "other_bytes": sum(entry.total_wire_bytes for entry in small),
        "beside_all_to_alls": list_overlaps(text, program, mesh.size),
    }


def is_backward(made: Collective | overlap.Span) -> bool:
    """Tell a transfer of the gradient's, by the name that jax gives to what it transposes."""
    return "transpose(" in made.op_name


def list_overlaps(text: str, program: Program, n: int) -> dict[str, list[int | None]]:
    """Count beside each all-to-all of seats the products of one chunk's seats with matrices of experts.

    In the order they end; None for one that does not start before it is waited for.
    """
    found: dict[str, list[int | None]] = {"forward": [], "backward": []}
    if program.executor != "all_to_all":
        return found
    one = 2 * count_seats(program, ROWS // n // program.chunks) * D_MODEL * D_FF
    for span in overlap.all_to_alls(text):
        # Half, because those of the router and others are far smaller than any expert's.
        products = sum(flops > one / 2 for flops in span.products)
        found["backward" if is_backward(span) else "forward"].append(products if span.starts_early else None)
    return found


def problems(row: dict[str, Any], program: Program) -> list[str]:
    """Say what a program sends otherwise than it should, or does not overlap."""
    found, formula = [], row["formula_bytes"]
    if row["of_tokens"] != row["of_tokens_expected"]:
        found.append(f"sends tokens by {dict(row['of_tokens'])} and not {row['of_tokens_expected']}")
    for direction in ("forward", "backward"):
        sent = row[f"{direction}_bytes"]
        if sent != formula:
            found.append(f"sends {sent:,} bytes {direction}, and by the formula it is {formula:,}")
    if program.dropless and row["kernels"] != KERNELS:
        found.append(f"calls {row['kernels']} kernels for {KERNELS} products")
    if program.early and not any(sum(row["beside_all_to_alls"].values(), [])):
        found.append("has no product of an expert beside an all-to-all")
    return [f"{program}: {problem}" for problem in found]
