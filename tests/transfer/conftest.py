"""Settings of the tests in this folder."""

import pytest

from tests.quick import compiled_quickly


@pytest.fixture(autouse=True)
def quick():
    """What is compiled here runs once."""
    with compiled_quickly():
        yield
