"""On 8 devices in the folder $WORK: each command is refused with its sentence and exit code 2."""

import contextlib
import io
import os
import re

from experiments.pretrain import main

os.chdir(os.environ["WORK"])
MISTAKES = [
    (
        "--train.batch-size 12",
        r"has 12 rows .* over 8 devices \(data 8 x fsdp 1 x expert 1\) .* multiple of 8",
    ),
    ("--train.accumulate 4", "a micro-batch has 4 rows"),
    ("--model.moe.sequences-per-group 4", "in groups of 4 .* make them a multiple of 32"),
    (
        "--mesh.data 2 --mesh.expert 4 --model.moe.num-experts 6",
        r"num_experts=6 does not divide over 4 devices",
    ),
    ("--mesh.tensor 4", r"model.num_kv_heads=2 does not divide over 4 devices \(tensor 4\)"),
    ("--mesh.tensor 2 --model.d-ff 255", "model.d_ff=255 does not divide over 2 devices"),
    (
        "--mesh.data 1 --mesh.fsdp 8 --model.d-model 60 --model.moe.d-model 60 --model.head-dim 16",
        "d_model=60 does not divide over 8",
    ),
    ("--mesh.data 4 --mesh.expert 4", "needs 16 devices, but there are 8"),
    ("--mesh.executor ragged_all_to_all", "carries dropless rows, but dispatch='gather'"),
    ("--mesh.data 0", "mesh.data is 0, but must be at least 1, or -1"),
]
for flags, sentence in MISTAKES:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["tiny", *flags.split()])
    said = said.getvalue()
    assert code == 2 and re.search(sentence, said), (flags, code, said)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    print("refused")
