"""The plain files of a run folder, written so that no reader ever finds half of one."""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switchmoe.train.errors import RunError

_PACKAGES = ("switchmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def prepare_folder(folder: Path) -> None:
    """Make a run's folder and try to write in it.

    Raises:
      RunError: one sentence, if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"the run folder {folder} can't be written ({error.strerror or error}); "
            "choose another with --out, or change its permissions."
        ) from error


def check_writable(folder: Path) -> None:
    """Look, without writing anything, whether a run's folder could be made and written in.

    Raises:
      RunError: one sentence, if it could not.
    """
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        reason = f"{nearest} is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"no permission to write in {nearest}"
    else:
        return
    raise RunError(f"the run folder {folder} can't be written ({reason}); choose another with --out.")


def write_text(path: Path, text: str) -> None:
    """Put a file in place all at once: a kill leaves the old one or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, all at once; numbers that JSON lacks become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote, or None if there is no such file.

    Raises:
      RunError: the file is there but is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}); mend it or remove it.") from error


def plain(value: Any) -> Any:
    """Turn arrays, numpy numbers and tuples into what JSON has; not-a-number and infinity into None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment() -> dict[str, Any]:
    """Say where a run happens: command, commit, versions, device."""
    devices = jax.devices()
    return {
        "command": [sys.executable, *sys.argv],
        **code(),
        "platform": platform.platform(),
        "device": _device_name(devices[0]),
        "backend": devices[0].platform,
        "device_count": len(devices),
        "cpu_count": os.cpu_count(),
    }


def code() -> dict[str, Any]:
    """Say which code runs: commit and versions."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _device_name(device: Any) -> str:
    """What a timing was taken on: jax's name of an accelerator, the processor and its cores for a CPU."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.processor() or 'CPU')}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit that the code runs from, with "+changes" if files differ from it; None without git."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # What experiments write down about themselves is not the code that runs.
        notes = [f":!experiments/{name}" for name in ("summaries", "RESULTS.md", "LOG.md")]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *notes)
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
