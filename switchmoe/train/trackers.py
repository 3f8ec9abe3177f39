"""Rows of metrics, passed on to TensorBoard or Weights & Biases by those who want them there."""

import importlib.util
from pathlib import Path
from typing import Any

from switchmoe.train.errors import RunError


class TensorBoard:
    """Writes a row's numbers as scalars into the run's `tensorboard` folder."""

    def __init__(self, folder: Path, *, last_step: int) -> None:
        from tensorboardX import SummaryWriter

        # purge_step tells TensorBoard to forget what a killed run wrote after the checkpoint.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends a row's numbers to a run named after the folder, so that a resumed run goes on with it."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        name = f"{folder.parent.name}-{folder.name}"
        self._run = wandb.init(
            project="switchmoe", id=name, name=name, config=config, dir=str(folder), resume="allow"
        )

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Make sure that the packages for what was asked are installed.

    Raises:
      RunError: one is not.
    """
    wanted = {"tensorboardX": tensorboard and "tensorboard", "wandb": wandb and "wandb"}
    for package, extra in wanted.items():
        if extra and importlib.util.find_spec(package) is None:
            raise RunError(
                f"--{extra} needs the package {package}; install it with: pip install '.[{extra}]'."
            )


def open_trackers(
    folder: Path, config: dict[str, Any], *, last_step: int, tensorboard: bool, wandb: bool
) -> list[Tracker]:
    """Open what was asked for, and `check_trackers` has found."""
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(folder, last_step=last_step))
    if wandb:
        trackers.append(WeightsAndBiases(folder, config))
    return trackers


def _scalars(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (prefix or name != "step"):
            flat[prefix + name] = value
    return flat
