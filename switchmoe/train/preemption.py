"""SIGTERM and SIGINT ask a run to save its state and leave."""

import signal
import threading
from typing import Any


class StopRequest:
    """Listens, inside a `with`, for SIGTERM (schedulers send it before they take a machine) and SIGINT.

    The first signal only sets `requested`, which the training loop reads after every step: it saves a
    checkpoint of that step and leaves with exit code 0; the same command goes on from there. A second
    signal acts as if nobody listened, so that Ctrl-C twice ends a run at once. Outside the main thread
    Python delivers no signals, and nothing is listened for.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _hear(self, number: int, frame: object) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
