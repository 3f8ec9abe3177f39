"""Made-up runs of the quickstart's two arms, as done.json and the summaries have them."""


def record(arm, rate, seed, loss, **changes):
    """A run as the summary keeps it: text in two domains, half a nat to either side of the loss."""
    sparse = arm == "switch"
    made_up = {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "hash": f"{arm}-{rate}",
        "steps": 600,
        "tokens": 2_457_600,
        "val_loss": loss,
        "val_loss_by_domain": None if loss is None else {"prose": loss - 0.5, "code": loss + 0.5},
        "flops_per_token": 1_040_000.0 if sparse else 1_000_000.0,
        "flops_per_token_executed": 1_200_000.0 if sparse else 1_000_000.0,
        "params_total": 3_000_000 if sparse else 600_000,
        "params_active": 620_000 if sparse else 600_000,
        "tokens_per_second": 20_000.0 if sparse else 40_000.0,
        "seconds": 122.88 if sparse else 61.44,
        "dropped_fraction": 0.02 if sparse else 0.0,
        "dropped_floor": 0.005 if sparse else 0.0,
        "max_vio": 0.25 if sparse else 0.0,
        "device": "cpu",
        "device_count": 1,
        "commit": "0123456789abcdef",
    }
    return made_up | changes
