"""Tests of the functional core; `oracle` and `worlds` are their shared tools."""
