"""What ends a run that can't go on, as one sentence and an exit code."""

import contextlib

# 0 is also the code of a run that SIGTERM or SIGINT stopped after saving its state.
EXIT_DONE, EXIT_BAD_INPUT, EXIT_NOT_FINITE = 0, 2, 3


class RunError(Exception):
    """A run that can't start or can't go on; `str(error)` is one sentence for a person, `code` the exit code.

    Codes: 2 for input that has to be changed, 3 for training that stopped because losses were not finite.
    """

    def __init__(self, sentence: str, code: int = EXIT_BAD_INPUT):
        super().__init__(sentence)
        self.code = code


@contextlib.contextmanager
def bad_input():
    """Turn an error about a file or a value, while a run is prepared, into a RunError with its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error
