"""What a run did, as one page: loss curves, expert load, load by domain, text coloured by expert.

Works on plain arrays and files and knows nothing of trainers: `build_routing` counts a model's decisions,
`write_report` writes the page, and `python -m switchmoe.report RUN` does it for a run folder. Needs the
`report` extra (matplotlib, jinja2), which is only imported when a page is written.
"""

from typing import TYPE_CHECKING

from switchmoe.report.files import load_routing, read_metrics, read_run, save_routing
from switchmoe.report.records import ArmRecord, RoutingRecord, Snippet, build_routing

if TYPE_CHECKING:
    from switchmoe.report.page import write_report

__all__ = [
    "ArmRecord",
    "RoutingRecord",
    "Snippet",
    "build_routing",
    "load_routing",
    "read_metrics",
    "read_run",
    "save_routing",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Imports the page, and with it matplotlib and jinja2, when it is first asked for (PEP 562)."""
    if name == "write_report":
        from switchmoe.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
