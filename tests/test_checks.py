"""The checker of annotations: strict about types, silent about the spelling of a word."""

from typing import Literal

import pytest
from beartype.roar import BeartypeCallHintParamViolation

from tests.checks import typechecked


@typechecked
def f(word: Literal["relu", "gelu"] | None = "relu", *, scale: float = 1.0):
    return word, scale


def test_a_word_may_be_misspelt_but_not_a_number():
    assert f("rely") == ("rely", 1.0) and f(None) == (None, 1.0) and f() == ("relu", 1.0)
    with pytest.raises(BeartypeCallHintParamViolation):
        f(3)


def test_an_int_may_stand_for_a_float_but_a_word_may_not():
    assert f(scale=2) == ("relu", 2)
    with pytest.raises(BeartypeCallHintParamViolation):
        f(scale="2")
