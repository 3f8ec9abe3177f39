"""Run a test's body on several simulated CPU devices, in a process of its own and with a time limit."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The number of devices is fixed when jax starts, so the body cannot run in the test's own process. The child
# gets the same shape checks as the tests around it.
_PREAMBLE = """
from tests.checks import install_checks
install_checks()
import jax
assert jax.device_count() == {devices}, f"asked for {devices} devices, jax has {{jax.device_count()}}"
"""


def run_on_devices(devices: int, body: str | Path, *, timeout: float = 120.0, environment=None) -> str:
    """Runs Python code, or the script at a Path, where jax sees `devices` CPU devices; returns its stdout.

    The code must wait for each step's outputs (jax.block_until_ready) before it dispatches the next: on few
    cores XLA:CPU's collectives otherwise starve and abort the process. `environment` adds or replaces
    variables. A non-zero exit or more than `timeout` seconds is an AssertionError that shows what the child
    printed.
    """
    code = body.read_text(encoding="utf-8") if isinstance(body, Path) else textwrap.dedent(body)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env.pop("XLA_FLAGS", None)  # A device count given there would win over the one asked for.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env.update(environment or {})
    command = [sys.executable, "-c", _PREAMBLE.format(devices=devices) + code]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"the body ran longer than {timeout:g} s on {devices} devices and was killed; it printed:\n"
            f"{_tail(error.stdout)}\n{_tail(error.stderr)}"
        ) from None
    assert done.returncode == 0, (
        f"the body ended with exit code {done.returncode} on {devices} devices:\n"
        f"{_tail(done.stdout)}\n{_tail(done.stderr)}"
    )
    return done.stdout


def _tail(output: str | bytes | None, characters: int = 4000) -> str:
    text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
    return text[-characters:]
