"""Write experiments/RESULTS.md from the summaries that the experiments left.

Question: none of its own; it shows what the other experiments found, and nobody types a number.
Command:  make results, or python experiments/results.py [--check]
Cost:     a second; it needs nothing but Python.
Result:   experiments/RESULTS.md, from every experiments/summaries/*.json. With --check nothing is written,
          and the exit code is 1 when the file is not what the summaries give.

Another experiment's summary gets a section of its own through a function in SECTIONS.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__:  # imported as experiments.results
    from experiments.transfer_section import transfer
else:  # run as a script, which finds its neighbours by their own names
    from transfer_section import transfer

HERE = Path(__file__).resolve().parent
ARMS = ("dense", "switch")
FLOPS_TOLERANCE = 0.05  # how much of the useful FLOPs per token the two arms may differ by
# Rows of the table of costs: field, format, what it is called.
COSTS = (
    ("steps", ",.0f", "steps"),
    ("tokens", ",.0f", "tokens"),
    ("flops_per_token", ",.0f", "FLOPs per token, useful (router counted)"),
    ("flops_per_token_executed", ",.0f", "FLOPs per token, executed (empty seats counted)"),
    ("params_total", ",.0f", "parameters"),
    ("params_active", ",.0f", "parameters a token meets"),
    ("dropped_fraction", ".2%", "dropped in training"),
    ("dropped_floor", ".2%", "dropped if experts were drawn evenly at random (floor)"),
    ("max_vio", ".2f", "MaxVio (the fullest expert's excess over its share)"),
)
SPEEDS = (("tokens_per_second", ",.0f", "tokens per second"), ("seconds", ",.1f", "seconds"))
Record = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows as a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def spread(values: list[float]) -> str:
    """The sample standard deviation, which one value has not."""
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"


def quickstart(summary: dict[str, Any]) -> str:
    """The section of the quickstart study: verdict, seeds, costs, domains, and the grid of learning rates."""
    grid, seeds, missing = summary["grid"], summary["seeds"], summary["missing"]
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in summary["learning_rates"].items())
    runs = grid + seeds
    devices = dict.fromkeys(f"{run['device_count']} x {run['device']}" for run in runs if "device" in run)
    commits = dict.fromkeys(run["commit"] or "unknown (run outside a clone)" for run in runs)
    parts = [
        "## Quickstart: a Switch Transformer beside its dense twin",
        "Two byte-level language models read the same batches of five domains of text, for the same number\n"
        "of steps and at equal useful FLOPs per token. Losses are on held-out text, in nats per byte.",
        f"Made by `{summary['command']}`, last on {summary['date']}.\n"
        f"Device: {', '.join(devices) or 'none'}. Commit: {', '.join(commits) or 'none'}.",
        *(f"**Warning**: {warning}" for warning in summary["warnings"]),
    ]
    if missing:
        parts.append(
            f"**Incomplete**: of {len(runs) + len(missing)} runs, these are missing: {'; '.join(missing)}."
        )
    parts += [
        "### Seeds",
        *about_seeds(seeds),
        "### Learning rates",
        f"Both arms tried the same rates, on a seed that is none of the above. The seeds use: {rates}.",
        grid_table(grid) if grid else "No rate of the grid has been run.",
    ]
    return "\n\n".join(parts)


def about_seeds(records: list[Record]) -> list[str]:
    """The verdict over the seeds, and the tables behind it; a seed counts as lower only with both losses."""
    pairs: dict[int, dict[str, Record]] = {}
    for record in records:
        pairs.setdefault(record["seed"], {})[record["arm"]] = record
    whole = [seed for seed in sorted(pairs) if all(pairs[seed].get(arm, {}).get("val_loss") for arm in ARMS)]
    if not whole:
        return ["No seed has a loss from both arms."]
    by_arm = {arm: [pairs[seed][arm] for seed in whole] for arm in ARMS}
    dense, switch = ([record["val_loss"] for record in by_arm[arm]] for arm in ARMS)
    gaps = [theirs - ours for ours, theirs in zip(dense, switch, strict=True)]
    columns = (dense, switch, gaps)
    rows = [[str(seed), *losses(*row)] for seed, *row in zip(whole, *columns, strict=True)]
    rows.append(["mean", *losses(*map(statistics.mean, columns))])
    rows.append(["sample standard deviation", *map(spread, columns)])
    twins, flops = ([record["flops_per_token"] for record in by_arm[arm]] for arm in ARMS)
    ratio = max((b / a for a, b in zip(twins, flops, strict=True)), key=lambda ratio: abs(ratio - 1))
    within = "within" if abs(ratio - 1) <= FLOPS_TOLERANCE else "**not within**"
    return [
        "**The Switch model's validation loss is lower than its dense twin's for "
        f"{sum(gap < 0 for gap in gaps)} of {len(pairs)} seeds.**\n"
        f"Its useful FLOPs per token are {ratio:.4f} times the twin's, {within} {FLOPS_TOLERANCE:.0%}.",
        table(["validation loss, seed", *ARMS, "switch − dense"], rows),
        f"Costs, as means over the seeds {', '.join(map(str, whole))}; seconds are of training alone, "
        "without compilation\nand evaluation:",
        table(["", *ARMS, "switch / dense"], cost_rows(by_arm)),
        "Validation loss by domain, as means over the same seeds:",
        table(["domain", *ARMS, "switch − dense"], domain_rows(by_arm)),
    ]


def losses(dense: float, switch: float, gap: float) -> list[str]:
    """The cells of a row of losses."""
    return [f"{dense:.4f}", f"{switch:.4f}", f"{gap:+.4f}"]


def cost_rows(by_arm: dict[str, list[Record]]) -> list[list[str]]:
    """Each cost of both arms and their ratio; speeds device by device."""
    wanted = [(*cost, by_arm) for cost in COSTS]
    for device in dict.fromkeys(record["device"] for arm in ARMS for record in by_arm[arm]):
        there = {arm: [record for record in by_arm[arm] if record["device"] == device] for arm in ARMS}
        wanted += [(field, form, f"{name}, {device}", there) for field, form, name in SPEEDS]
    rows = []
    for field, form, name, found in wanted:
        dense, switch = (
            statistics.mean(record[field] for record in found[arm]) if found[arm] else None for arm in ARMS
        )
        cells = ["–" if value is None else format(value, form) for value in (dense, switch)]
        rows.append([name, *cells, f"{switch / dense:.3f}" if dense and switch is not None else "–"])
    return rows


def domain_rows(by_arm: dict[str, list[Record]]) -> list[list[str]]:
    """The mean loss of both arms on each domain."""
    rows = []
    for domain in by_arm["dense"][0]["val_loss_by_domain"]:
        dense, switch = (
            statistics.mean(record["val_loss_by_domain"][domain] for record in by_arm[arm]) for arm in ARMS
        )
        rows.append([domain, *losses(dense, switch, switch - dense)])
    return rows


def grid_table(records: list[Record]) -> str:
    """The loss of both arms at each learning rate, the lowest of an arm marked."""
    found = {(record["arm"], record["learning_rate"]): record["val_loss"] for record in records}
    finite = [(loss, key) for key, loss in found.items() if loss is not None]
    best = {min((item for item in finite if item[1][0] == arm), default=(0, None))[1] for arm in ARMS}

    def cell(key: tuple[str, float]) -> str:
        if key not in found:
            return "not run"
        if found[key] is None:
            return "not finite"
        return f"**{found[key]:.4f}** (best)" if key in best else f"{found[key]:.4f}"

    rates = sorted({rate for _, rate in found})
    rows = ([f"{rate:g}", *(cell((arm, rate)) for arm in ARMS)] for rate in rates)
    return table(["learning rate", *ARMS], rows)


# The function that writes the section of each summary, by the name of the file.
def quantize(summary: dict[str, Any]) -> str:
    """The section of rounded experts: their bytes, and the loss on held-out text."""
    rows = [
        [
            "as trained" if row["bits"] is None else f"{row['bits']} bits",
            f"{row['expert_bytes']:,}",
            f"{row['share_of_bytes']:.3f}",
            f"{row['val_loss']:.4f}",
            f"{row['loss_change']:+.3%}",
        ]
        for row in summary["rows"]
    ]
    about = f"`python experiments/quantize_study.py RUN`, {summary['date']}, {summary['device']}."
    said = f"The run is {summary['run']}. Only experts are rounded; bytes are theirs, scales included."
    head = ("experts", "bytes", "of all", "validation loss", "change")
    return f"## Experts of 8 and 4 bits\n\n{about} {said}\n\n{table(head, rows)}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quickstart": quickstart,
    "quantize": quantize,
    "transfer": lambda summary: transfer(summary, table),
}


def render(folder: Path) -> str:
    """Make the text of RESULTS.md from a folder of summaries."""
    parts = [
        "# Results",
        "Generated by `make results` (python experiments/results.py) from experiments/summaries/: what is\n"
        "typed here is lost. What failed is in [LOG.md](LOG.md).",
    ]
    for path in sorted(folder.glob("*.json")):
        if path.stem in SECTIONS:
            parts.append(SECTIONS[path.stem](json.loads(path.read_text(encoding="utf-8"))))
        else:
            parts.append(
                f"{path.name} is not shown: SECTIONS in experiments/results.py has no {path.stem!r}."
            )
    if len(parts) == 2:
        parts.append("There is no summary yet: no experiment has been run.")
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str], folder: Path = HERE) -> int:
    """Write, or check, the RESULTS.md of a folder of experiments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if RESULTS.md is out of date"
    )
    text, path = render(folder / "summaries"), folder / "RESULTS.md"
    if not parser.parse_args(arguments).check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"error: {path} is not what the summaries give; run make results.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
