"""Tests of the report page; `worlds` makes the records they render."""
