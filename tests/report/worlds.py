"""Small records, worked out by hand, that the report tests render."""

import numpy as np

from switchmoe.report import ArmRecord, RoutingRecord, build_routing


def tokens(text: str) -> list[int]:
    """The byte tokenizer, restated: byte b is token b + 3."""
    return [byte + 3 for byte in text.encode()]


def routing_of(texts: dict[str, str], experts: list, kept: list, num_experts: int) -> RoutingRecord:
    """One row a domain, padded with 0; `experts` and `kept` are [layer][row][position], one choice a token.

    The weight of expert e is (e + 1) / 10 everywhere, so that a title can be told by its expert.
    """
    rows = [tokens(text) for text in texts.values()]
    length = max(map(len, rows))
    ids_BS = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)

    def padded(values, fill):
        return np.array([[row + [fill] * (length - len(row)) for row in layer] for layer in values])[
            ..., None
        ]

    expert_LBSK = padded(experts, 0).astype(np.int32)
    return build_routing(
        ids_BS,
        np.arange(len(rows)),
        expert_LBSK,
        ((expert_LBSK + 1) / 10).astype(np.float32),
        padded(kept, True),
        domains=list(texts),
        num_experts=num_experts,
        dropped_floor_L=np.full(len(experts), 0.0013),
    )


def two_layers() -> RoutingRecord:
    """'hé<' and 'ab': é is two bytes; in layer 0 its first byte is dropped, in layer 1 only its second is."""
    return routing_of(
        {"one": "hé<", "two": "ab"},
        experts=[[[0, 1, 2, 1], [2, 2]], [[1, 0, 2, 0], [0, 1]]],
        kept=[[[True, False, True, True], [True, False]], [[True, True, False, True], [True, True]]],
        num_experts=3,
    )


def arm(name: str = "switch", val_loss: float = 1.5, **summary) -> ArmRecord:
    """Twenty logged steps whose loss falls by a tenth a step; validated at steps 10 and 20."""
    rows = [{"step": s, "loss": 4 - s / 10, "seconds": s / 2, "flops": s * 1e9} for s in range(1, 21)]
    rows[9]["val_loss"], rows[19]["val_loss"] = 3.1, val_loss
    whole = {
        "steps": 20,
        "tokens": 20_480,
        "val_loss": val_loss,
        "val_loss_by_domain": {"one": val_loss - 0.1, "two": val_loss + 0.1},
        "flops_per_token": 2_000_000.0,
        "flops_per_token_executed": 2_500_000.0,
        "params_total": 3_000_000,
        "params_active": 1_000_000,
        "tokens_per_second": 31_234.5,
        "seconds": 10.0,
        "dropped_fraction": 0.012,
        "max_vio": 0.25,
    }
    return ArmRecord(name, rows, whole | summary)
