"""`python -m switchmoe.report RUN` writes RUN/report.html from what a run left in its folder."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from switchmoe.report.files import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and prints its path; returns 2, with one sentence on stderr, when it cannot."""
    parser = argparse.ArgumentParser(prog="python -m switchmoe.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: OUT/NAME-HASH/SEED")
    parser.add_argument("--out", type=Path, help="where to write the page (default: RUN/report.html)")
    options = parser.parse_args(arguments)
    try:
        arm, routing, environment = read_run(options.run)
        # matplotlib and jinja2 are an extra, and slow to import: a wrong folder is told apart before.
        from switchmoe.report.page import write_report

        path = write_report(
            options.out or options.run / "report.html",
            title=f"Run {arm.name}",
            arms=[arm],
            routing=routing,
            command=_command(environment.get("command")),
            device=_text(environment.get("device")),
            commit=_text(environment.get("commit")),
        )
    except ModuleNotFoundError as error:
        print(f"The report needs {error.name}: pip install 'switchmoe[report]'.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _command(value: object) -> str:
    """A command kept as a list of words, as one would type it: the interpreter by its name alone."""
    if not isinstance(value, list) or not value:
        return _text(value)
    return shlex.join([Path(str(value[0])).name, *map(str, value[1:])])


if __name__ == "__main__":
    sys.exit(main())
