"""How a process ends when another one of its job is lost or it fails itself: in a sentence, and soon."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from switchmoe.parallel.launch import ClusterError

EXIT_LOST = 4
EXIT_INTERRUPTED = 130  # What a shell reports for SIGINT.

# What jax's errors say when a collective or a message fails since a process at the other end is gone.
_LOST = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed|broken pipe|coordination service|heartbeat"
    r"|^UNAVAILABLE|barrier|timed out|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)

# The sentence for an abort, None where that is not ours to explain, and the exit code. The C callback must
# stay referenced. Who takes the lock speaks, and nobody later: an abort can come while this process leaves.
_sentence: str | None = None
_code = EXIT_LOST
_callback: Any = None
_last_words = threading.Lock()


def explain_abort(sentence: str | None) -> None:
    """Make an abort of this process end in a sentence and EXIT_LOST; None undoes that.

    When another process stops answering, a thread of jax writes why and calls abort(): Python sees no
    exception, and the process is gone before a Python handler would run. A C handler is called in time, in
    the thread that aborts.
    """
    global _sentence, _callback
    _sentence = sentence
    if os.name != "posix" or (sentence is None) == (_callback is None):
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _callback = None if sentence is None else ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_abort)
    libc.signal(signal.SIGABRT, None if _callback is None else ctypes.cast(_callback, ctypes.c_void_p))


def _on_abort(number: int) -> None:
    if _last_words.acquire(timeout=5):
        # No print: the main thread may hold the lock of sys.stderr.
        os.write(2, f"error: {_sentence}\n".encode())
    os._exit(_code)


def leave(sentence: str, code: int) -> NoReturn:
    """Say a sentence on stderr and end this process at once, whatever its threads are doing."""
    _say(sentence)
    os._exit(code)


def _say(sentence: str) -> None:
    if _last_words.acquire(timeout=5):
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {sentence}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """End this process at once, with a sentence and an exit code, if the body fails where there are several.

    An exception with a `code` (ClusterError, and those of the training) is one sentence and that code; an
    error of jax that comes from a lost process is one sentence and EXIT_LOST; anything else is a traceback
    and 1. With one process the exception passes. A clean end passes too: then all leave together.

    The process leaves by os._exit and not by the exception, since on a normal exit jax waits up to
    `shutdown_seconds` for the other processes, while these are inside a collective and wait for this one.
    Gone at once, it is missed within `lost_seconds`. Nothing is lost by that: checkpoints are complete or
    absent, rows are on the disk.
    """
    try:
        yield
    except BaseException as error:
        if not (jax.distributed.is_initialized() and jax.process_count() > 1):
            raise
        if isinstance(error, SystemExit) and not error.code:
            raise
        _leave_after(error)


def _leave_after(error: BaseException) -> NoReturn:
    global _code
    sentence, code = _explain(error)
    if isinstance(error, ClusterError) and error.together:
        # Every process is here with the same error, so they can leave as after a clean end; if not, in 10 s.
        timer = threading.Timer(10, os._exit, [code])
        timer.daemon = True
        timer.start()
        _code = code  # If shutting down aborts.
        _say(sentence)
        jax.distributed.shutdown()
        os._exit(code)
    if jax.process_index() == 0:
        # Process 0 holds the coordinator: without it all others are ended. One that failed with the same
        # error gets the time to say so.
        time.sleep(2)
    leave(sentence, code)


def _explain(error: BaseException) -> tuple[str, int]:
    where = f"process {jax.process_index()} of {jax.process_count()}"
    code = getattr(error, "code", None)
    if isinstance(error, SystemExit):
        return f"{where} exits with {code!r}.", code if isinstance(code, int) else 1
    if isinstance(code, int):
        return str(error), code
    if isinstance(error, KeyboardInterrupt):
        return f"{where} was interrupted.", EXIT_INTERRUPTED
    first = next(iter(str(error).splitlines()), "")[:200]
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
        return (
            f"{where} stops since another process was lost ({first}); see what that one wrote, and start the "
            "same command again to go on from the last checkpoint."
        ), EXIT_LOST
    traceback.print_exception(error)
    return f"{where} failed ({type(error).__name__}: {first}) and ends the whole job.", 1
