"""Reads a run folder and keeps routing records in a .npz without pickle."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from switchmoe.report.records import ArmRecord, RoutingRecord, Snippet

ARRAYS = (
    "load_LE",
    "kept_LE",
    "load_by_domain_NLE",
    "dropped_fraction_L",
    "dropped_floor_L",
    "dropped_by_position_LP",
)
SNIPPET_ARRAYS = ("token_ids_S", "expert_LSK", "weight_LSK", "kept_LSK")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl; a last line torn by a killed process is left out.

    Raises ValueError when any other line is not a JSON object: that file was not written by a run.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path} line {number} is not a JSON object, so it is not the metrics of a run.")
    return rows


def read_run(folder: str | Path) -> tuple[ArmRecord, RoutingRecord | None, dict[str, Any]]:
    """Reads what a run left: its arm, its routing if it kept any, and its environment (env.json, or {}).

    Raises ValueError with one sentence when the folder does not hold a run.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(_no_run(folder))
    summary = _read_object(folder / "done.json")
    name = _read_object(folder / "config.json").get("name") or folder.resolve().name
    routing = folder / "routing.npz"
    arm = ArmRecord(str(name), read_metrics(metrics), summary.get("summary", summary))
    return arm, load_routing(routing) if routing.is_file() else None, _read_object(folder / "env.json")


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist: name the folder of a run, the one with metrics.jsonl in it."
    if not folder.is_dir():
        return f"{folder} is a file: name the folder of a run, the one with metrics.jsonl in it."
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    inside += sorted(path.parent for path in folder.glob("*/*/metrics.jsonl"))
    hint = f"; did you mean {inside[0]}?" if inside else ": name the folder that holds one."
    return f"{folder} is not a run, it has no metrics.jsonl{hint}"


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    return value if isinstance(value, dict) else {}


def save_routing(path: str | Path, record: RoutingRecord) -> None:
    """Writes a routing record as a compressed .npz of plain arrays."""
    arrays = {name: getattr(record, name) for name in ARRAYS}
    arrays["domains"] = np.array(record.domains, dtype=str)
    arrays["snippet_domains"] = np.array([snippet.domain for snippet in record.snippets], dtype=str)
    for i, snippet in enumerate(record.snippets):
        for name in SNIPPET_ARRAYS:
            arrays[f"snippet_{i}_{name}"] = getattr(snippet, name)
    with open(path, "wb") as file:  # numpy would add .npz to a path without it.
        np.savez_compressed(file, **arrays)


def load_routing(path: str | Path) -> RoutingRecord:
    """Reads what `save_routing` wrote; raises ValueError when the file holds something else."""
    try:
        # Opened here, because numpy leaves a file that is no archive open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        snippets = tuple(
            Snippet(str(domain), *(arrays[f"snippet_{i}_{name}"] for name in SNIPPET_ARRAYS))
            for i, domain in enumerate(arrays["snippet_domains"])
        )
        return RoutingRecord(
            **{name: arrays[name] for name in ARRAYS},
            domains=tuple(str(domain) for domain in arrays["domains"]),
            snippets=snippets,
        )
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a routing record of switchmoe.report: {error}.") from None
