"""The numbers of a report as words: the summary sentences, the tiles and the tables."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from switchmoe.report.records import ArmRecord

DASH = "\N{EM DASH}"
MINUS = "\N{MINUS SIGN}"
MATCHED = 0.05  # Two arms count as matched in FLOPs per token up to this relative difference.
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def number(value: Any, digits: int) -> str:
    """A number with so many decimals, a dash for what is missing."""
    return f"{value:,.{digits}f}".replace("-", MINUS) if _finite(value) else DASH


def percent(value: Any) -> str:
    """A fraction as a percentage with one decimal; two below one per cent, where the chance floors are."""
    if not _finite(value):
        return DASH
    return f"{100 * value:.{2 if 0 < abs(value) < 0.01 else 1}f}%"


def short(value: Any) -> str:
    """Three significant digits and a prefix: 1,234,567 is 1.23 M."""
    if not _finite(value):
        return DASH
    for unit, letter in UNITS:
        if abs(value) >= unit:
            scaled = value / unit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {letter}"
    return f"{value:.3g}"


def shown_name(arm: ArmRecord) -> str:
    """The arm's name as a heading: 'switch' is 'Switch', a name with more than letters stays as it is."""
    return arm.name.capitalize() if arm.name.isalpha() and arm.name.islower() else arm.name


def shown_domain(name: str) -> str:
    """A domain is named by its file: 'bible_english' reads better, and wraps, as 'bible english'."""
    return name.replace("_", " ")


def baseline(arms: Sequence[ArmRecord]) -> int:
    """Which arm the others are compared with: the first called dense, or the first."""
    return next((i for i, arm in enumerate(arms) if "dense" in arm.name.lower()), 0)


def summary(arms: Sequence[ArmRecord]) -> list[str]:
    """The headline in a sentence or two, saying no more than the summaries do."""
    known = [arm for arm in arms if _finite(arm.value("val_loss"))]
    if len(known) < len(arms) or not arms:
        steps = [row["step"] for arm in arms for row in arm.metrics if "step" in row]
        last = f"No final validation loss was recorded; the last row is of step {max(steps, default=0):,}."
        return [last] if steps else []
    if len(arms) == 1:
        return [_one(arms[0])]
    base = arms[baseline(arms)]
    others = [arm for arm in arms if arm is not base]
    return [_steps(arms) + "; ".join(_against(arm, base) for arm in others) + ".", *_cost(base, others)]


def _one(arm: ArmRecord) -> str:
    trained = f" after {short(arm.value('tokens'))} tokens" if _finite(arm.value("tokens")) else ""
    loss = number(arm.value("val_loss"), 3)
    return f"{shown_name(arm)} reaches a validation loss of {loss} nats per token{trained}."


def _steps(arms: Sequence[ArmRecord]) -> str:
    steps = [arm.value("steps") for arm in arms]
    if not all(_finite(count) for count in steps):
        return ""
    if len(set(steps)) == 1:
        return f"After {steps[0]:,} steps each, "
    each = ", ".join(f"{shown_name(arm)} {count:,}" for arm, count in zip(arms, steps, strict=True))
    return f"After different numbers of steps ({each}), "


def _against(arm: ArmRecord, base: ArmRecord) -> str:
    ours, theirs = arm.value("val_loss"), base.value("val_loss")
    apart = f"{abs(ours - theirs):.3f}"
    word = "no different" if apart == "0.000" else f"{apart} {'lower' if ours < theirs else 'higher'}"
    return (
        f"{shown_name(arm)} has a validation loss of {ours:.3f} nats per token against {theirs:.3f} for "
        f"{shown_name(base)}: {word}"
    )


def _cost(base: ArmRecord, others: Sequence[ArmRecord]) -> list[str]:
    """What that difference was bought with, when there are two arms to say it of."""
    if len(others) != 1:
        return []
    arm = others[0]
    ours, theirs = arm.value("flops_per_token"), base.value("flops_per_token")
    sizes = arm.value("params_total"), base.value("params_total")
    if not all(_finite(value) and value > 0 for value in (ours, theirs, *sizes)):
        return []
    apart = abs(ours / theirs - 1)
    matched = "matched" if apart <= MATCHED else "not matched"
    ratio = sizes[0] / sizes[1]
    more = f"{ratio:.1f} times the parameters" if ratio >= 1.05 else f"{short(sizes[0])} parameters"
    return [
        f"The useful FLOPs per token are {matched}, {short(ours)} against {short(theirs)} "
        f"({percent(apart)} apart), while {shown_name(arm)} holds {more}."
    ]


def tiles(arms: Sequence[ArmRecord]) -> list[dict[str, Any]]:
    """The validation losses in large type; `arm` picks the colour."""
    return [
        {"arm": i, "name": shown_name(arm), "value": number(arm.value("val_loss"), 3)}
        for i, arm in enumerate(arms)
        if _finite(arm.value("val_loss"))
    ]


def table(arms: Sequence[ArmRecord]) -> list[tuple[str, list[str]]]:
    """(what, one value an arm), without the lines that no arm has a value for."""
    rows = [
        ("Validation loss, nats per token", "val_loss", lambda v: number(v, 3)),
        ("Steps", "steps", lambda v: number(v, 0)),
        ("Training tokens", "tokens", short),
        ("Useful FLOPs per token, training", "flops_per_token", short),
        ("Executed FLOPs per token, with empty seats", "flops_per_token_executed", short),
        ("Parameters in memory", "params_total", short),
        ("Parameters used by a token", "params_active", short),
        ("Training tokens per second", "tokens_per_second", short),
        ("Training seconds", "seconds", lambda v: number(v, 0)),
        ("Choices dropped, training", "dropped_fraction", percent),
        ("MaxVio, training", "max_vio", lambda v: number(v, 2)),
    ]
    lines = [(label, [form(arm.value(key)) for arm in arms]) for label, key, form in rows]
    return [(label, values) for label, values in lines if any(value != DASH for value in values)]


def domain_table(arms: Sequence[ArmRecord]) -> list[tuple[str, list[str], str]]:
    """(domain, one loss an arm, difference of the other arm from the baseline; '' unless there are two)."""
    losses = [dict(arm.value("val_loss_by_domain") or {}) for arm in arms]
    names = list(dict.fromkeys(name for loss in losses for name in loss))
    base = baseline(arms)

    def difference(name: str) -> str:
        pair = [loss[name] for loss in losses if _finite(loss.get(name))]
        if len(losses) != 2 or len(pair) != 2:
            return ""
        change = pair[1 - base] - pair[base]
        return f"{'+' if change > 0 else MINUS}{abs(change):.3f}"

    return [
        (shown_domain(name), [number(loss.get(name), 3) for loss in losses], difference(name))
        for name in names
    ]
