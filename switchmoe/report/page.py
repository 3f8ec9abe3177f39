"""Puts records together into one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from switchmoe.report import figures, palette, text, words
from switchmoe.report.records import ArmRecord, RoutingRecord

BAR_WIDTH, BAR_HEIGHT = 320, 104  # The plotting area of one layer's load, in SVG units.


def write_report(
    path: str | Path,
    *,
    title: str,
    arms: Sequence[ArmRecord] = (),
    routing: RoutingRecord | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    device: str = "",
    commit: str = "",
) -> Path:
    """Writes the report of one run, or of several to compare, and returns its path.

    The page asks nothing of the network. Sections without data are left out. `notes` are sentences shown
    below the summary, for what the numbers cannot say (that the arms saw the same batches, for instance).
    `routing` is that of the arm with experts. Folders on the way to `path` are made.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    charts = [(axis, figures.loss_chart(arms, axis)) for axis in figures.AXES] if arms else []
    page = environment.get_template("page.html").render(
        title=title,
        summary=words.summary(arms),
        notes=notes,
        names=[words.shown_name(arm) for arm in arms],
        arm_colours=palette.ARMS,
        styles=figures.arm_styles(arms),
        tiles=words.tiles(arms),
        table=words.table(arms),
        domain_table=words.domain_table(arms),
        charts=[(axis, chart) for axis, chart in charts if chart],
        missing_axes=[axis for axis, chart in charts if not chart],
        smoothing=max((figures.curve(arm, "steps").width for arm in arms), default=1),
        frame=figures.loss_frame(arms),
        routing=None if routing is None else _routing_view(routing),
        provenance=[(k, v) for k, v in (("Command", command), ("Device", device), ("Commit", commit)) if v],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _routing_view(record: RoutingRecord) -> dict[str, Any]:
    """What the template shows of a routing record."""
    colours = palette.expert_colours(record.num_experts)
    share_NLE = record.domain_share_NLE
    return {
        "experts": record.num_experts,
        "layers": record.num_layers,
        "choices": int(record.load_LE[0].sum()),
        "colours": [(colour, palette.channels(colour)) for colour in colours],
        "many": record.num_experts > len(palette.SIXTEEN),
        "wide": record.num_experts > 2 * len(palette.SIXTEEN),
        "bars": _bars(record),
        "floor_known": bool(np.isfinite(record.dropped_floor_L).any()),
        "stats": [
            {
                "dropped": words.percent(record.dropped_fraction_L[layer]),
                "floor": words.percent(record.dropped_floor_L[layer]),
                "max_vio": words.number(record.max_vio_L[layer], 2),
                "dead": int(record.dead_L[layer]),
                "bits": words.number(record.domain_bits_L[layer], 2),
            }
            for layer in range(record.num_layers)
        ],
        "most_bits": words.number(float(np.log2(max(1, min(record.num_experts, len(record.domains))))), 2),
        "dropped": figures.dropped_chart(record) if record.dropped_by_position_LP.any() else None,
        "domains": [words.shown_domain(name) for name in record.domains],
        "share": share_NLE.tolist(),
        "largest_share": float(share_NLE.max(initial=1e-9)),
        "snippets": [
            {"domain": words.shown_domain(snippet.domain), "characters": text.coloured(snippet, 0)}
            for snippet in record.snippets
        ],
        "script": [text.for_script(snippet) for snippet in record.snippets],
    }


def _bars(record: RoutingRecord) -> dict[str, Any]:
    """Heights and places of the load bars, on one scale for all layers so that they can be compared."""
    utilisation_LE = record.utilisation_LE
    kept_LE = utilisation_LE * record.kept_LE / np.maximum(record.load_LE, 1)
    top = max(1.5, float(utilisation_LE.max(initial=0)) * 1.08)
    pitch = BAR_WIDTH / record.num_experts
    gap = pitch * 0.16
    every = -(-record.num_experts // 16)  # At most 16 labels.

    def y(value: float) -> float:
        return round(BAR_HEIGHT * (1 - value / top), 2)

    return {
        "width": BAR_WIDTH,
        "height": BAR_HEIGHT,
        "ideal": y(1),
        "ticks": [(value, y(value)) for value in range(0, int(top) + 1, max(1, int(top) // 4))],
        "layers": [
            [
                {
                    "x": round(expert * pitch + gap / 2, 2),
                    "width": round(pitch - gap, 2),
                    "middle": round((expert + 0.5) * pitch, 2),
                    "y": y(load),
                    "kept_y": y(kept),
                    "label": expert % every == 0,
                    "load": f"{load:.2f}",
                    "share": words.percent(load / record.num_experts),
                    "lost": words.percent(1 - kept / load if load else 0.0),
                }
                for expert, (load, kept) in enumerate(zip(loads, kepts, strict=True))
            ]
            for loads, kepts in zip(utilisation_LE, kept_LE, strict=True)
        ],
    }
