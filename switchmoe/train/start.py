"""What happens before the first step is compiled: everything is looked at, by all processes alike."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchmoe.data import PackedCorpus, load_packed
from switchmoe.parallel import Layout, MeshConfig, make_layout
from switchmoe.parallel.mesh import AXES
from switchmoe.parallel.processes import agree, gather_errors, process_count
from switchmoe.train.checkpoint import Checkpoints, refuse_other_config
from switchmoe.train.checks import check_matmul, check_mesh, check_vocabulary, refuse_other_text_of_done
from switchmoe.train.config import TrainConfig, to_json
from switchmoe.train.errors import RunError, bad_input
from switchmoe.train.records import check_writable, code, environment, read_json
from switchmoe.train.trackers import check_trackers


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn an error about a file or a value into a RunError; of several processes, one's error ends all."""
    try:
        with bad_input():
            yield
    except RunError as error:
        if process_count() > 1:
            gather_errors(str(error))
        raise
    gather_errors(None)


def find_done(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """Read what done.json says of a finished run; None if it is not finished.

    Raises:
      RunError: the folder belongs to another configuration or text, or can't be read.
      ClusterError: the processes do not see the same folder.
    """
    with together():
        saved = read_json(folder / "config.json")
        if saved is not None:
            refuse_other_config(saved, config, f"the run in {folder}")
        done = read_json(folder / "done.json")
        if done is not None:
            refuse_other_text_of_done(done.get("text_fingerprint"), config.data)
    agree("run folder", str(folder.absolute()))
    agree("state of the run folder", f"started={saved is not None} done={done is not None}")
    return done


def prepare(
    config: TrainConfig, folder: Path, mesh: MeshConfig, *, tensorboard: bool, wandb: bool
) -> tuple[PackedCorpus, Layout | None]:
    """Load the text, arrange the devices, and see that everything fits, without writing to the run's folder.

    A mesh of one device is no mesh: the layout is None, and everything is as if there were no others.

    Raises:
      RunError, ValueError, OSError: one sentence, if something does not fit.
    """
    check_trackers(tensorboard=tensorboard, wandb=wandb)
    check_writable(folder)
    layout = make_layout(mesh)
    layout = None if layout.mesh.size == 1 else layout
    check_mesh(config, layout)
    check_matmul(config)
    corpus = load_packed(config.data)
    check_vocabulary(corpus, config)
    return corpus, layout


def agree_on_run(config: TrainConfig, mesh: MeshConfig, corpus: PackedCorpus) -> None:
    """Make sure that all processes mean the same run, of the same code and text; with one there is no doubt.

    Raises:
      ClusterError: they don't.
    """
    if process_count() == 1:
        return
    asked = to_json(config) | {"mesh": dataclasses.asdict(mesh)}
    asked["data"] |= {"cache_dir": None}  # which may be a place of the machine's own
    for part, settings in asked.items():
        agree(f"configuration ({part})", json.dumps(settings, sort_keys=True))
    agree("version of the code", json.dumps(code()))
    agree("text", corpus.fingerprint)


def check_checkpoints(checkpoints: Checkpoints) -> None:
    """Make sure that the newest checkpoint is one of this run's, and that all processes see the same one.

    Raises:
      RunError: it is of another configuration or text.
      ClusterError: the processes see different ones.
    """
    with together():
        checkpoints.check()
    agree("newest checkpoint", str(checkpoints.latest))


def surroundings(corpus: PackedCorpus, layout: Layout | None) -> dict[str, Any]:
    """Say where a run happens, and on which text."""
    return environment() | {
        "mesh": dict.fromkeys(AXES, 1) if layout is None else dict(layout.mesh.shape),
        "process_count": process_count(),
        "text_fingerprint": corpus.fingerprint,
    }
