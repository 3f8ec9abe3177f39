"""Runs every notebook of colab/ from a clean kernel, after checking how it is stored.

A stored notebook has no outputs, and its paired .py (jupytext, percent format) holds the same cells.
Execution happens on a copy, with SWITCHMOE_FAST=1 unless the variable is set already. Exit code 1 when
anything is wrong.

    python .ci/notebook.py [--check] [--save DIR]

--check looks only at how notebooks are stored; --save keeps the executed copies, figures and all, for a look.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]


def stored_problems(path: Path) -> list[str]:
    """Says what is wrong with a notebook as it lies in the tree: outputs, or a .py that differs."""
    notebook = nbformat.read(path, as_version=4)
    problems = [
        f"cell {number} has stored outputs; write the notebook anew with jupytext --to ipynb {path.stem}.py"
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]
    script = path.with_suffix(".py")
    if not script.is_file():
        return [
            *problems,
            f"has no paired {script.name}; make it with jupytext --set-formats ipynb,py:percent",
        ]
    paired = jupytext.read(script)
    ours, theirs = (
        [(cell.cell_type, cell.source.strip()) for cell in book.cells] for book in (notebook, paired)
    )
    if ours != theirs:
        same = [mine == other for mine, other in zip(ours, theirs, strict=False)]
        first = same.index(False) if False in same else len(same)
        problems.append(f"differs from {script.name}, first at cell {first}; run jupytext --sync {path.name}")
    return problems


def execute(path: Path, save: Path | None, timeout: int = 300) -> str | None:
    """Runs all cells in a fresh kernel of this interpreter; returns what failed, or None."""
    import nbclient

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        return str(error)
    except (TimeoutError, nbclient.exceptions.CellTimeoutError, nbclient.exceptions.DeadKernelError) as error:
        return f"did not finish: {error}"
    finally:
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, save / path.name)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="do not execute")
    parser.add_argument("--save", type=Path, default=None, help="keep the executed copies in this folder")
    arguments = parser.parse_args()
    os.environ.setdefault("SWITCHMOE_FAST", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    notebooks = sorted((ROOT / "colab").glob("*.ipynb"))
    if not notebooks:
        print("colab/ holds no notebook", file=sys.stderr)
        return 1
    failed = 0
    for path in notebooks:
        start = time.monotonic()
        problems = stored_problems(path)
        if not problems and not arguments.check and (error := execute(path, arguments.save)):
            problems = [error]
        failed += bool(problems)
        print(f"{path.name}: {'failed' if problems else 'ok'} ({time.monotonic() - start:.0f} s)")
        for problem in problems:
            print(f"  {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
