"""What a run tells the world while it trains: files, trackers and the screen, all of them process 0's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchmoe.parallel.processes import is_main
from switchmoe.train.collapse import CollapseAlarm
from switchmoe.train.config import TrainConfig, to_json
from switchmoe.train.display import Display, DisplayMode
from switchmoe.train.metrics import MetricsFile
from switchmoe.train.records import write_json
from switchmoe.train.trackers import open_trackers

Row = dict[str, Any]


class Recorder:
    """Writes config.json, env.json, the rows of metrics and done.json, and shows them.

    Of several processes only process 0 does; the others keep the same `rows` in memory and are silent.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        where: dict[str, Any],
        start: int,
        display: DisplayMode,
        on_row: Callable[[Row], None] | None,
        tensorboard: bool,
        wandb: bool,
    ) -> None:
        self._main, self._folder = is_main(), folder
        self._warned: set[str] = set()
        if self._main:
            write_json(folder / "config.json", to_json(config))
            write_json(folder / "env.json", where | {"start_step": start})
        trackers = open_trackers(
            folder,
            to_json(config),
            last_step=start,
            tensorboard=tensorboard and self._main,
            wandb=wandb and self._main,
        )
        self._metrics = MetricsFile(folder / "metrics.jsonl", last_step=start, writes=self._main)
        self._alarm = CollapseAlarm(self._metrics.rows)
        self._writers = [self._metrics, *trackers]
        self._on_row = on_row if on_row is not None and self._main else lambda row: None
        mode = display if self._main else "quiet"
        self._display = Display(mode, name=config.name, steps=config.train.steps, start=start)

    @property
    def rows(self) -> list[Row]:
        """The rows of the whole run so far, those of earlier starts too."""
        return self._metrics.rows

    def say(self, text: str | None) -> None:
        """Print a line, if there is one."""
        if text is not None:
            self._display.say(text)

    def warn(self, text: str | None, *, once: str | None = None) -> None:
        """Show a warning, if there is one; only the first of those with the same name for `once`."""
        if text is None or once in self._warned:
            return
        if once is not None:
            self._warned.add(once)
        if self._main:
            self._display.warn(text)

    def advance(self, step: int) -> None:
        """Show that a step was taken."""
        self._display.advance(step)

    def write(self, row: Row) -> None:
        """Keep and show a row, and warn if it is the one in which a router has collapsed for long enough."""
        warning = self._alarm.hear(row.get("collapsed_layers", []))
        if warning is not None:
            row["collapse_warning"] = warning
            self.warn(f"step {row['step']}: {warning}")
        for writer in self._writers:
            writer.write(row)
        self._on_row(row)
        self._display.show(row)

    def finish(self, done: dict[str, Any]) -> None:
        """Say in done.json that the run is done."""
        if self._main:
            write_json(self._folder / "done.json", done)

    def close(self) -> None:
        """Let go of the screen and of all files."""
        self._display.close()
        for writer in self._writers:
            writer.close()
