"""Runs experiments/pretrain.py as a person would, and dies at a moment given by name: child.py MOMENT FLAGS.

Each moment ends this very process with SIGKILL, which nothing in it can notice, or sends it a SIGTERM.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import pretrain
from switchmoe.train import display, metrics


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def at_step(step: int, act) -> None:
    """Act when a step has been dispatched, before anything else is done about it."""
    advance = display.Display.advance

    def advance_and_act(self, now):
        advance(self, now)
        if now == step:
            act()

    display.Display.advance = advance_and_act


def in_row(step: int) -> None:
    """Die with half of a row of metrics in the file."""
    write = metrics.MetricsFile.write

    def half(self, row):
        if row["step"] == step:
            self._file.write(f'{{"step": {step}, "loss": 3.1')
            self._file.flush()
            die()
        write(self, row)

    metrics.MetricsFile.write = half


def on_event(wanted: str, match) -> None:
    """Die just before an operating system call that Python audits, if its arguments match."""

    def hook(event, arguments):
        if event == wanted and match(*arguments):
            die()

    sys.addaudithook(hook)


def in_checkpoint(step: int) -> None:
    """Die when the first files of a checkpoint are in its temporary folder, before its metadata is."""
    part = f"{os.sep}{step}.orbax-checkpoint-tmp{os.sep}"
    on_event("open", lambda path, mode, flags: part in str(path) and flags & os.O_CREAT)


def before_commit(step: int) -> None:
    """Die when a whole checkpoint is written, but not yet renamed to its own name."""
    on_event("os.rename", lambda source, *others: str(source).endswith(f"{step}.orbax-checkpoint-tmp"))


def in_removal(step: int) -> None:
    """Die when an old checkpoint is partly removed."""
    state = {"inside": False, "removed": 0}

    def hook(event, arguments):
        if event == "shutil.rmtree" and str(arguments[0]).endswith(f"checkpoints{os.sep}{step}"):
            state["inside"] = True
        elif event == "os.remove" and state["inside"]:
            state["removed"] += 1
            if state["removed"] == 3:
                die()

    sys.addaudithook(hook)


def before_done() -> None:
    """Die when everything is saved except that the run is done."""
    on_event("os.rename", lambda source, *others: str(source).endswith(".done.json.unfinished"))


MOMENTS = {
    "never": lambda: None,
    "after step 4": lambda: at_step(4, die),
    "in row 9": lambda: in_row(9),
    "in checkpoint 10": lambda: in_checkpoint(10),
    "before commit of 10": lambda: before_commit(10),
    "SIGTERM at step 13": lambda: at_step(13, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "in removal of 10": lambda: in_removal(10),
    "before done": before_done,
}

if __name__ == "__main__":
    MOMENTS[sys.argv[1]]()
    sys.exit(pretrain.main(sys.argv[2:]))
