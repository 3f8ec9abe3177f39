"""SIGTERM and SIGINT ask a run to save its state and leave."""

import os
import signal
import threading
from typing import Any

from switchmoe.parallel.processes import process_count, stop_requested


class StopRequest:
    """Listens, inside a `with`, for SIGTERM (schedulers send it before they take a machine) and SIGINT.

    The first signal only sets `requested`; the training loop asks `after` every step, saves a checkpoint of
    that step and leaves with exit code 0; the same command goes on from there. A second signal acts as if
    nobody listened, so that Ctrl-C twice ends a run at once. Outside the main thread Python delivers no
    signals, and nothing is listened for.

    With several processes jax itself listens for SIGTERM, and all of them stop after the same step, whichever
    was told to; SIGINT becomes SIGTERM there.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}
        self._several = False

    def __enter__(self) -> "StopRequest":
        self._several = process_count() > 1
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def after(self, step: int) -> bool:
        """Whether to stop after this step; of several processes each must ask after each, and all agree."""
        if self._several and self.requested is None and stop_requested(step):
            self.requested = signal.Signals.SIGTERM.name
        return self.requested is not None

    def _hear(self, number: int, frame: object) -> None:
        self._restore()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.requested = signal.Signals(number).name

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
