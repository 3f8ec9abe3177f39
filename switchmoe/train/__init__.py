"""Training: configurations and presets, the loop, checkpoints and metrics.

    result = run_training(preset("tiny"), out="runs")
    model, config = load_model(result.folder)

Needs the `train` extra. Names are loaded when they are first touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchmoe.train.checkpoint import load_model, load_params
    from switchmoe.train.config import (
        OptimizerConfig,
        TrainConfig,
        TrainSettings,
        TuneConfig,
        run_folder,
        run_hash,
    )
    from switchmoe.train.errors import RunError
    from switchmoe.train.given import Teacher, fingerprint
    from switchmoe.train.loop import run_training
    from switchmoe.train.metrics import read_rows
    from switchmoe.train.presets import PRESETS, preset
    from switchmoe.train.running import RunResult

_HOME = {
    "OptimizerConfig": "config",
    "PRESETS": "presets",
    "RunError": "errors",
    "RunResult": "running",
    "Teacher": "given",
    "TrainConfig": "config",
    "TrainSettings": "config",
    "TuneConfig": "config",
    "fingerprint": "given",
    "load_model": "checkpoint",
    "load_params": "checkpoint",
    "preset": "presets",
    "read_rows": "metrics",
    "run_folder": "config",
    "run_hash": "config",
    "run_training": "loop",
}

__all__ = [
    "PRESETS",
    "OptimizerConfig",
    "RunError",
    "RunResult",
    "Teacher",
    "TrainConfig",
    "TrainSettings",
    "TuneConfig",
    "fingerprint",
    "load_model",
    "load_params",
    "preset",
    "read_rows",
    "run_folder",
    "run_hash",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
