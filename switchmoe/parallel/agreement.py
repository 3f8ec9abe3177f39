"""What several processes tell each other before they work together: what they have, and what went wrong."""

import collections
import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from switchmoe.parallel.launch import ClusterError

_TEXT_BYTES = 2048  # Room for what one process says.


def agree(what: str, value: str) -> None:
    """Make sure that all processes have the same value of something; every process must call it.

    Args:
      what: its name, without an article: "configuration", "checkpoint step".
      value: any text; compared by its SHA-256, shown if it is short.

    Raises:
      ClusterError: in every process, naming the first one that differs from process 0.
    """
    digest = hashlib.sha256(value.encode()).hexdigest()
    shown = repr(value) if len(value) <= 60 else f"SHA-256 {digest[:12]}..."
    said = [text.split(" ", 1) for text in _gather(f"{digest} {shown}")]
    for index, (theirs, their_value) in enumerate(said):
        if theirs != said[0][0]:
            raise ClusterError(
                f"process {index} of {len(said)} has another {what} ({their_value}) than process 0 "
                f"({said[0][1]}); start all processes with the same command, code and files.",
                together=True,
            )


def gather_errors(sentence: str | None) -> None:
    """Tell all processes what went wrong in this one, or that nothing did; every process must call it.

    Raises:
      ClusterError: in every process, if any of them had an error: the sentence of the first that had.
    """
    texts = _gather(sentence or "")
    for index, text in enumerate(texts):
        if text:
            where = f"process {index} of {len(texts)}: " if len(texts) > 1 else ""
            raise ClusterError(where + text, together=True)


def _gather(text: str) -> list[str]:
    """Send a text, cut to _TEXT_BYTES, from every process to all; returns them in the order of processes."""
    processes = jax.process_count()
    if processes == 1:
        return [text]
    if not jax.distributed.is_initialized():
        raise ClusterError(
            f"jax sees {processes} processes that were not joined; add --launch.distributed on."
        )
    devices = collections.Counter(device.process_index for device in jax.devices())
    for index, count in sorted(devices.items()):
        if count != devices[0]:
            raise ClusterError(
                f"process {index} of {processes} has {count} devices and process 0 has {devices[0]}; every "
                "process needs the same number.",
                together=True,
            )
    sent = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = text.encode()[:_TEXT_BYTES]
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.asarray(multihost_utils.process_allgather(sent))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in received]
