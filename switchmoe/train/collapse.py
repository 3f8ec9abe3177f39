"""Noticing that a router sends everything to a few experts."""

from collections.abc import Iterable
from typing import Any

import numpy as np

# Of the tokens of a step, the share that one expert may get before its layer counts as collapsed.
SHARE_OF_ONE = 0.8
# The share of a layer's experts that may stand idle.
SHARE_IDLE = 0.5
# Idle experts only say something where chance alone leaves few of them idle: exp(-8) is 1 in 3,000.
CHOICES_PER_EXPERT = 8
# Logged steps in a row before the alarm; a router swings in its first steps.
PATIENCE = 2


def collapsed_layers(
    load_fraction_LE: np.ndarray, *, tokens: np.ndarray | float, choices: np.ndarray | float
) -> list[int]:
    """Name the layers where nearly every token goes to the same experts.

    A layer has collapsed if one expert is chosen by more than 80% of the tokens, or if more than half of
    the experts are chosen by none. `load_fraction_LE` is each expert's share of a layer's choices (so a
    token with k choices counts k times), `tokens` and `choices` are how many of each a layer has, or [L] for
    each layer. A layer without a choice to make (as many choices a token as experts) can't collapse, and
    idle experts count only with 8 choices an expert or more.
    """
    num_experts = load_fraction_LE.shape[-1]
    per_token = np.asarray(choices) / np.maximum(tokens, 1)
    bad_L = load_fraction_LE.max(axis=-1) * per_token > SHARE_OF_ONE
    enough_L = np.asarray(choices) >= CHOICES_PER_EXPERT * num_experts
    bad_L |= enough_L & ((load_fraction_LE == 0).sum(axis=-1) > SHARE_IDLE * num_experts)
    return np.flatnonzero(bad_L & (np.ceil(per_token) < num_experts)).tolist()


class CollapseAlarm:
    """Warns once when layers were collapsed for two logged steps in a row, and again after a recovery."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Start where the rows already written end, so that a resumed run warns as an unbroken one would."""
        self._streak: dict[int, int] = {}
        for row in rows:
            self._count(row.get("collapsed_layers", []))

    def hear(self, layers: list[int]) -> str | None:
        """Take the collapsed layers of a logged step; return a warning if some were so for long enough."""
        self._count(layers)
        new = [layer for layer in layers if self._streak[layer] == PATIENCE]
        if not new:
            return None
        names = ", ".join(map(str, new))
        return (
            f"ROUTER COLLAPSE in MoE layer {names}: nearly all tokens go to the same experts; "
            "raise model.moe.balance_coef, lower optimizer.learning_rate, or warm up for longer."
        )

    def _count(self, layers: list[int]) -> None:
        self._streak = {layer: self._streak.get(layer, 0) + 1 for layer in layers}
