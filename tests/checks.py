"""The shape and type checks that stand over the package while tests run."""

import contextlib
import functools
import types
from typing import Literal, Union, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# As a static checker reads it, an int may stand where a float is annotated: capacity_factor=2 is no mistake.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install_checks():
    """Check every annotation of switchmoe's modules that are imported from now on."""
    # The hook wants the checker's name and looks it up through this module, imported as `tests.checks`.
    return install_import_hook("switchmoe", "tests.checks.typechecked")


@contextlib.contextmanager
def unchecked():
    """Take these checks away, as a user has it: the library's own sentence has to come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def typechecked(function):
    """Check a function as beartype does, but leave a misspelt word to the function's own error sentence.

    Literal["relu", "gelu"] is checked as str: arguments are checked before a dataclass's __post_init__ runs,
    and the tests want to read what it says about "rely".
    """
    hints = getattr(function, "__annotations__", {})
    loose = {name: _without_literals(hint) for name, hint in hints.items()}
    if loose == hints or not isinstance(function, types.FunctionType):
        return _check(function)
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    copy = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    copy.__annotations__ = loose
    return _check(copy)


def _without_literals(hint):
    if get_origin(hint) is Literal:
        return Union[tuple({type(value) for value in get_args(hint)})]  # noqa: UP007
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_without_literals(part) for part in get_args(hint))]  # noqa: UP007
    return hint
