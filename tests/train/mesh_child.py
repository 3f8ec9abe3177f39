"""Runs experiments/pretrain.py, notes states at saves and loads, and dies: mesh_child.py NOTES STEP FLAGS.

A note is a line of JSON: the step, a hash of each array's bytes, and how many experts the first device has.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from experiments import pretrain
from switchmoe.train.checkpoint import Checkpoints
from switchmoe.train.display import Display

notes, last = Path(sys.argv[1]), int(sys.argv[2])
save, load, advance = Checkpoints.save, Checkpoints.load, Display.advance


def note(what, state):
    hashes = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    experts_LEDF = state.params["blocks"]["layer_1"]["feed_forward"]["w_in_EDF"]
    experts = experts_LEDF.addressable_shards[0].data.shape[1]
    line = {"what": what, "step": int(state.step), "state": hashes, "experts": experts}
    with notes.open("a") as file:
        file.write(json.dumps(line) + "\n")


def save_and_note(self, state, *others):
    note("saved", state)
    save(self, state, *others)


def load_and_note(self, like):
    state, clock = load(self, like)
    note("loaded", state)
    return state, clock


def advance_or_die(self, step):
    advance(self, step)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)


Checkpoints.save, Checkpoints.load, Display.advance = save_and_note, load_and_note, advance_or_die
sys.exit(pretrain.main(sys.argv[3:]))
