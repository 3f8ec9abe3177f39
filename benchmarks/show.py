"""The benchmark's rows as a table: drawn on a terminal, plain columns elsewhere."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
# Field of a row, heading, how a value is written.
COLUMNS = (
    ("name", "implementation", "{}"),
    ("capacity_factor", "capacity", "{:g}"),
    ("seconds", "ms", "{:.1f}"),
    ("to_dense", "to dense", "{:.2f}"),
    ("to_bare", "to bare", "{:.3f}"),
    ("useful_flops", "useful GF", "{:.1f}"),
    ("executed_flops", "executed GF", "{:.1f}"),
    ("dropped_fraction", "dropped", "{:.2%}"),
    ("temporary_bytes", "temp MB", "{:.1f}"),
    ("routing_share", "routing", "{:.2%}"),
)
UNITS = {
    "seconds": 1e3,
    "useful_flops": 1e-9,
    "executed_flops": 1e-9,
    "temporary_bytes": 1e-6,
    "flops_per_second": 1e-12,
}
Columns = Sequence[tuple[str, str, str]]


def cells(row: Row, columns: Columns = COLUMNS) -> list[str]:
    """Write a row's values, a dash where it has none."""
    written = []
    for field, _, pattern in columns:
        value = row[field]
        if value is not None and field in UNITS:
            value *= UNITS[field]
        written.append("-" if value is None else pattern.format(value))
    return written


def show(title: str, rows: Sequence[Row], console: Console, columns: Columns = COLUMNS) -> None:
    """Print the rows of one size under a title."""
    headings = [heading for _, heading, _ in columns]
    written = [cells(row, columns) for row in rows]
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == headings[0] else "right")
        for line in written:
            table.add_row(*line)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *written, strict=True)]
    print(f"\n{title}")
    for line in (headings, *written):
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *others]), flush=True)
