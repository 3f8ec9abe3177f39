"""A Switch Transformer that was trained here, in transformers: converted by the command, and run there."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from switchmoe.models import with_moe
from switchmoe.train import load_model
from tests.interop.worlds import logits_of
from tests.live.cases import VOCAB, draw_inputs

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to fix
ROOT = Path(__file__).resolve().parents[2]
SEATS = 2


def command(script, *arguments):
    line = [sys.executable, f"experiments/{script}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_pretrained_here_and_run_there(tmp_path):
    transformers.logging.set_verbosity_error()
    command("pretrain.py", "tiny-switch", "--train.steps", 3, "--out", tmp_path / "runs")
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/*/done.json"))
    command("convert.py", run, tmp_path / "hf", "--to", "hf", "--expert-capacity", SEATS)
    ours = load_model(run)[0]
    assert ours.config.vocab_size >= VOCAB and ours.config.moe is not None
    ours = with_moe(ours, dataclasses.replace(ours.config.moe, expert_capacity=SEATS, sequences_per_group=1))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    inputs = draw_inputs("switch", 0)
    logits, kept, dropped = logits_of(ours, inputs)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(inputs.ids).long(),
            attention_mask=torch.tensor(inputs.mask).long(),
            decoder_input_ids=torch.tensor(inputs.decoder_ids).long(),
            decoder_attention_mask=torch.tensor(inputs.decoder_mask).long(),
        ).logits.numpy()
    assert min(dropped) > 0
    np.testing.assert_allclose(logits[kept], wanted[kept], rtol=0, atol=1e-4)
