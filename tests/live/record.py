"""Record what transformers makes of the cases, for the tests that run without it.

    python -m tests.live.record [NAME ...]

writes tests/interop/recorded/NAME: config.json and model.safetensors as transformers saves them, record.json
and answers.safetensors. Do it again when a case is added; a new release of transformers is no reason, since
.ci/parity.sh compares with what is installed.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.numpy import save_file

from tests.live.cases import CASES, settle

RECORDED = Path(__file__).resolve().parents[1] / "interop" / "recorded"


def record(name: str) -> None:
    """Write one case."""
    model, inputs, answers = settle(name)
    folder = RECORDED / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {key: array for key, array in inputs._asdict().items() if array is not None}
    save_file(arrays | {"logits": answers.logits, "tokens": answers.tokens}, folder / "answers.safetensors")
    about = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dropped": answers.dropped,
        "margin": answers.margin,
    }
    (folder / "record.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for case in sys.argv[1:] or CASES:
        record(case)
