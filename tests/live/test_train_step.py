"""The training-step benchmark as a person starts it, at a tiny size: both sides compute one loss."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def test_both_sides_compute_one_loss_and_go_on_alike(tmp_path):
    sizes = {
        "rounds": 2, "rows": 2, "source-length": 64, "d-model": 64, "d-ff": 96, "num-heads": 1,
        "num-experts": 4, "vocab-size": 400, "json": tmp_path / "new" / "it.json",
    }  # fmt: skip
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "new" / "it.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["switchmoe", "switchmoe, 1.25", "transformers", "transformers, fused"]
    assert record["versions"]["torch"] and record["settings"]["rows"] == 2
    losses = [rows[name]["losses"] for name in ("switchmoe", "transformers", "transformers, fused")]
    assert losses[0][0] > losses[0][2]
    for ours, *theirs in zip(*losses, strict=True):
        # The router's losses, which are ours alone, and decay of the norms, theirs alone, are small.
        assert max(abs(other - ours) for other in theirs) < 1e-3 * ours
