"""What a person sees of a run while it trains."""

import math
import sys
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DisplayMode = Literal["auto", "bar", "plain", "quiet"]


class Display:
    """Shows a run: a bar on a terminal, plain lines elsewhere, nothing when quiet. Warnings show always.

    Args:
      mode: "auto" chooses by whether stdout is a terminal.
      steps: the run's length.
      start: the step it goes on from.
    """

    def __init__(self, mode: DisplayMode, *, name: str, steps: int, start: int) -> None:
        self._steps = steps
        self._quiet = mode == "quiet"
        self._progress: Progress | None = None
        if mode == "bar" or (mode == "auto" and sys.stdout.isatty()):
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._task = self._progress.add_task(name, total=steps, completed=start, line="compiling")
            self._progress.start()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], line=line(row))
        else:
            self.say(f"step {row['step']}/{self._steps}  {line(row)}")
        if "val_loss" in row:
            self.say(f"step {row['step']}/{self._steps}  validation {evaluation_line(row)}")

    def warn(self, text: str) -> None:
        """Show a warning so that nobody can miss it: in red, on stderr or above the bar."""
        if self._progress is not None:
            self._progress.console.print(f"\n!!! {text}\n", style="bold white on red", markup=False)
        else:
            Console(stderr=True, soft_wrap=True).print(
                f"!!! {text}", style="bold red", markup=False, highlight=False
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()


def line(row: dict[str, Any]) -> str:
    """A row of metrics as one short line: loss, speed, MFU if known, drops beside their floor, MaxVio."""
    parts = [f"loss {number(row['loss'])}", f"{number(row['tokens_per_second'], ',.0f')} tokens/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {number(row['mfu'], '.1%')}")
    if "balance_loss" in row:  # a dense model has no router
        dropped, floor = (number(row[name], ".1%") for name in ("dropped_fraction", "dropped_floor"))
        parts.append(f"dropped {dropped} (chance {floor})")
        parts.append(f"MaxVio {number(row['max_vio'], '.2f')}")
    if row["skipped"]:
        parts.append(f"{row['skipped']} skipped")
    return "  ".join(parts)


def evaluation_line(row: dict[str, Any]) -> str:
    """The losses on held-out text as one line."""
    domains = "  ".join(f"{name} {number(loss, '.3f')}" for name, loss in row["val_loss_by_domain"].items())
    return f"loss {number(row['val_loss'])}  ({domains})"


def number(value: float | None, form: str = ".4f") -> str:
    """Write a number, or "not finite" for NaN, infinity, and the None that stands for them in JSON."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)
