"""metrics.jsonl: one row a logged step, without a gap or a double, however often the run was killed."""

import json
import os
from pathlib import Path
from typing import Any

from switchmoe.train.errors import RunError
from switchmoe.train.records import plain, write_text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, oldest first; a last line that a kill cut short is left out.

    Raises:
      RunError: a line before the last is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    lines.pop()  # Whatever follows the last newline was never finished; usually nothing does.
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"line {number} of {path} is not JSON; mend or remove it.") from error
    return rows


class MetricsFile:
    """Appends rows; each is on the disk before `write` returns, so no checkpoint is ahead of its metrics."""

    def __init__(self, path: Path, *, last_step: int, writes: bool = True) -> None:
        """Open the file for a run that goes on after `last_step`; rows of later steps are cut off at once.

        Of several processes one `writes`; the others read what is there, and remember their rows.
        """
        self.rows = [row for row in read_rows(path) if row["step"] <= last_step]
        self._file = None
        if writes:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = open(path, "a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; not-a-number becomes null, which is what JSON has."""
        row = plain(row)
        self.rows.append(row)
        if self._file is None:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
