"""The section of RESULTS.md about transfer_study.py, from its summary; it needs nothing but Python."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]
Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]

# What a run of fine-tuning is compared with: the model before it, by the arm's name.
_BEFORE = {"dense, all": "dense"}


def transfer(summary: dict[str, Any], table: Table) -> str:
    """Write what going on from the quickstart's two models brought, part by part."""
    found = summary["found"]
    runs = [record for record in found.values() if isinstance(record, dict) and "hash" in record]
    devices = dict.fromkeys(f"{run['device_count']} x {run['device']}" for run in runs)
    commits = dict.fromkeys(run["commit"] or "unknown (run outside a clone)" for run in runs)
    parts = [
        "## Going on from the quickstart: upcycling, fine-tuning, distilling, pruning",
        "Seed 0 alone; losses are on held-out text, in nats per byte. FLOPs are useful ones.",
        f"Made by `{summary['command']}`, last on {summary['date']}.\n"
        f"Device: {', '.join(devices) or 'none'}. Commit: {', '.join(commits) or 'none'}.",
    ]
    if summary["missing"]:
        parts.append(f"**Incomplete**: these runs are missing: {'; '.join(summary['missing'])}.")
    by_part = {
        part: [run for run in runs if run.get("part") == part] for part in ("upcycle", "finetune", "distil")
    }
    bases = {arm: found[f"base, {arm}"] for arm in ("dense", "switch") if f"base, {arm}" in found}
    if by_part["upcycle"]:
        parts += ["### Upcycling the dense model", *_upcycling(by_part["upcycle"], table)]
    if by_part["finetune"] and "start" in found:
        parts += ["### Fine-tuning on a small text", *_finetuning(by_part["finetune"], found["start"], table)]
    if by_part["distil"] and len(bases) == 2:
        parts += ["### Distilling the Switch model", *_distilling(by_part["distil"], bases, table)]
    if "prune" in found:
        parts += ["### Leaving out experts of the Switch model", *_pruning(found["prune"], table)]
    texts = [run for run in runs if run.get("text")]
    if texts:
        parts += ["### What the models write", *_texts(texts)]
    return "\n\n".join(parts)


def _flops(run: Record) -> float:
    return run["tokens"] * run["flops_per_token"]


def _name(run: Record) -> str:
    return f"{run['arm']}, {run['learning_rate']:g}"


def _upcycling(runs: list[Record], table: Table) -> list[str]:
    def best(arms: Iterable[Record]) -> Record | None:
        return min(arms, key=lambda run: run["val_loss"], default=None)

    dense = best(run for run in runs if run["arm"] == "dense goes on")
    anew = [run for run in runs if "drawn anew" in run["arm"]]
    # One arm against another, so that both have had as many tries.
    upcycled = best(run for run in runs if run["arm"] == "copy")
    said = []
    if dense and upcycled:
        gap = upcycled["val_loss"] - dense["val_loss"]
        said.append(
            f"**At equal FLOPs upcycling ends {'lower' if gap < 0 else 'no lower'} than training the dense "
            f"model on: {upcycled['val_loss']:.4f} ({_name(upcycled)}) against {dense['val_loss']:.4f} "
            f"({_name(dense)}), {gap:+.4f}.** One seed can't tell\n"
            "a gap from noise that is smaller than the spread over seeds of the quickstart's study."
        )
    rows = [
        [
            _name(run),
            f"{run['steps']:,}",
            f"{_flops(run):.3g}",
            f"{run['params_total']:,}",
            f"{run['val_loss']:.4f}",
        ]
        for run in runs
    ]
    said.append(table(["arm, learning rate", "steps", "FLOPs", "parameters", "validation loss"], rows))
    if anew:
        said.append("The Switch model that is drawn anew gets the FLOPs of the dense model before and after.")
    return said


def _finetuning(runs: list[Record], start: dict[str, float], table: Table) -> list[str]:
    rows = []
    for run in runs:
        step, lowest, _ = min(run["curve"], key=lambda point: point[1])
        _, last, train = run["curve"][-1]
        before = start[_BEFORE.get(run["arm"], "switch")]
        numbers = (before, lowest, last, train, last - train)
        rows.append([_name(run), *(f"{number:.4f}" for number in numbers), f"{step:,}"])
    header = [
        "arm, learning rate",
        "before",
        "lowest",
        "at the end",
        "training loss",
        "gap",
        "step of the lowest",
    ]
    return [
        "The text is one that no model has read. The gap is that of the last step: held-out less training\n"
        "loss, the latter with dropout where there is any.",
        table(header, rows),
    ]


def _distilling(runs: list[Record], bases: dict[str, Record], table: Table) -> list[str]:
    twin, teacher = (bases[arm]["val_loss"] for arm in ("dense", "switch"))

    def row(name: str, run: Record) -> list[str]:
        # Where the teacher leads by nothing there is no share of it; + 0.0 takes the sign off a zero.
        kept = f"{(twin - run['val_loss']) / (twin - teacher) + 0.0:.0%}" if teacher < twin else "–"
        return [name, f"{run['params_total']:,}", f"{run['val_loss']:.4f}", kept]

    rows = [row("the teacher", bases["switch"]), row("dense twin (nobody's student)", bases["dense"])]
    rows += [row(run["arm"], run) for run in runs]
    return [
        "Students have the dense twin's shape, steps and learning rate. The gain is the teacher's lead over\n"
        "the twin. A copied student starts from trained weights, so part of its lead is longer training.",
        table(["model", "parameters", "validation loss", "share of the gain"], rows),
    ]


def _pruning(records: list[Record], table: Table) -> list[str]:
    whole, pruned = records[0], records[1:]
    rows = []
    for keep in dict.fromkeys(record["keep"] for record in pruned):
        those = [record for record in pruned if record["keep"] == keep]
        own = [run for run in those if run["domain"] != "first"]
        (first,) = [run for run in those if run["domain"] == "first"]
        costs = [
            run["val_loss_by_domain"][run["domain"]] - whole["val_loss_by_domain"][run["domain"]]
            for run in own
        ]
        everywhere = [run["val_loss"] - whole["val_loss"] for run in own]
        rows.append([
            str(keep),
            f"{first['params_total']:,}",
            f"{statistics.mean(costs):+.4f}",
            f"{statistics.mean(everywhere):+.4f}",
            f"{first['val_loss'] - whole['val_loss']:+.4f}",
        ])  # fmt: skip
    header = ["experts kept", "parameters", "on that domain", "on all", "first experts, on all"]
    return [
        f"All {whole['keep']} experts: {whole['params_total']:,} parameters, validation loss "
        f"{whole['val_loss']:.4f}. Each layer keeps the experts that a domain's training text\nuses most; "
        "what that costs, as means over the domains:",
        table(header, rows),
    ]


def _texts(runs: list[Record]) -> list[str]:
    best: dict[tuple[str, str], Record] = {}
    for run in runs:
        key = (run["part"], run["arm"])
        if key not in best or run["val_loss"] < best[key]["val_loss"]:
            best[key] = run
    lines = [f"- {part}, {arm}: `{run['text']!r}`" for (part, arm), run in best.items()]
    return ["Drawn at temperature 0.7 after the line `**HAMLET**`:", "\n".join(lines)]
