"""Saving the whole state of a run beside the training, and going on from the newest complete save."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from switchmoe.models import TransformerLM
from switchmoe.models.adapters import merge_adapters
from switchmoe.train.checks import refuse_other_text
from switchmoe.train.config import TrainConfig, from_json, identity, run_hash, to_json
from switchmoe.train.errors import RunError
from switchmoe.train.model import Params, adapted_model, join, pure_model
from switchmoe.train.parts import split_weights
from switchmoe.train.records import read_json
from switchmoe.train.step import TrainState


class Checkpoints:
    """The checkpoints of a run, in FOLDER/checkpoints/STEP; use it in a `with`.

    Each holds the TrainState (weights, biases, optimizer, step, which is also the place in the data) and, as
    metadata, the resolved configuration, the fingerprint of the text and the seconds trained so far. Orbax
    writes into a temporary folder in the background and renames it when all is on the disk, so a folder
    named STEP is complete; only then are old ones removed. An existing one is never written over.
    """

    def __init__(self, folder: Path, config: TrainConfig, text: str) -> None:
        self._config, self._text = config, text
        # Any, since orbax's annotation of the parameter does not admit orbax's own policy.
        newest: Any = ocp.training.preservation_policies.LatestN(config.train.keep_checkpoints)
        self._opened = ocp.training.Checkpointer(
            str((folder / "checkpoints").absolute()),
            save_decision_policy=_Always(),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until the last save is on the disk."""
        self._opened.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        newest = self._opened.latest
        return None if newest is None else newest.step

    def check(self) -> None:
        """Make sure that the newest checkpoint belongs to this configuration and this text.

        Raises:
          RunError: it was saved with another one, or has no configuration.
        """
        if self.latest is None:
            return
        about = self._metadata()
        saved = about.get("config")
        if saved is None:
            raise RunError(
                f"the checkpoint in {self._place()} has no configuration, so it is not one of switchmoe's; "
                "move it away or choose another --out."
            )
        refuse_other_config(saved, self._config, f"the checkpoint in {self._place()}")
        refuse_other_text(about.get("text_fingerprint"), self._text, self._config.data)

    def load(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read the newest checkpoint into the shapes, types and places of `like`; returns it and its clock.

        `like` is a state or describes one (`abstract_state`). It may lie on another mesh, and on devices of
        another number of processes, than the state that was saved; no bit of that changes.

        Raises:
          RunError: it can't be read.
        """
        want = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        try:
            saved = self._opened.load(self.latest, abstract_state=_on_disk(want))
            return TrainState(**saved), self._metadata()["clock"]
        except Exception as error:  # Whatever a damaged file makes orbax raise.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"the checkpoint in {self._place()} can't be read ({reason}); "
                "remove that folder to go on from the one before."
            ) from error

    def save(self, state: TrainState, step: int, clock: dict[str, Any]) -> None:
        """Start to write the state of `step` (waiting for the save before, if it still runs)."""
        if step in [checkpoint.step for checkpoint in self._opened.checkpoints]:
            return
        if jax.default_backend() == "cpu":
            # On CPU "copying to the host" hands out the device's own memory, which the next step, that the
            # state is donated to, may write into while the background still reads it.
            state = jax.tree.map(jnp.copy, state)
        about = {
            "config": to_json(self._config),
            "hash": run_hash(self._config),
            "text_fingerprint": self._text,
            "clock": clock,
        }
        self._opened.save_async(step, _on_disk(state), custom_metadata=about)

    def _metadata(self) -> dict[str, Any]:
        saved = self._opened.metadata(self.latest).custom_metadata
        return saved if isinstance(saved, dict) else {}

    def _place(self) -> Path:
        return Path(self._opened.directory) / str(self.latest)


def _on_disk(state: TrainState) -> dict[str, Any]:
    """Name the parts of a state that a checkpoint holds; older ones have no biases and nothing frozen."""
    return {name: part for name, part in state._asdict().items() if name not in ("biases", "frozen") or part}


class _Always:
    """The training loop decides when to save."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


def refuse_other_config(saved: dict[str, Any], config: TrainConfig, what: str) -> None:
    """Compare a saved configuration with the one in hand.

    Raises:
      RunError: naming up to three settings that differ.
    """
    now, then = identity(to_json(config)), identity(saved)
    now["train.seed"], then["train.seed"] = config.train.seed, saved["train"]["seed"]
    different = [
        f"{name} is {then.get(name)} there and {now.get(name)} here"
        for name in sorted(now.keys() | then.keys())
        if then.get(name) != now.get(name)
    ]
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise RunError(
            f"{what} belongs to another configuration ({', '.join(different[:3])}{more}); "
            "use the same settings, or another --out."
        )


def load_params(folder: str | Path) -> tuple[Params, TrainConfig]:
    """Read the newest weights of a run folder and the configuration they were trained with.

    All are there that `pure_model` wants, frozen ones and balance biases among them; adapters are merged into
    the experts that they belong to.

    Raises:
      RunError: the folder has no configuration or no checkpoint.
    """
    folder = Path(folder)
    saved = read_json(folder / "config.json")
    if saved is None:
        raise RunError(f"{folder} is no run folder: it has no config.json.")
    config = from_json(saved)
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    if not steps:
        raise RunError(f"{folder} has no checkpoint yet.")
    place = (folder / "checkpoints" / str(max(steps))).absolute()
    shapes = jax.eval_shape(adapted_model(pure_model(config.model), config.tune).init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    want = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
    parts = zip(("params", "frozen", "biases"), split_weights(want, config.tune.part), strict=True)
    parts = {name: part for name, part in parts if part}
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # without the optimizer
    with context:
        saved = ocp.load(str(place), parts)
    params = functools.reduce(join, saved.values())
    return merge_adapters(params, alpha=config.tune.lora_alpha), config


def load_model(folder: str | Path) -> tuple[TransformerLM, TrainConfig]:
    """Read the newest model of a run folder, ready to be called, and its configuration; see `load_params`."""
    params, config = load_params(folder)
    return pure_model(config.model).bind(params), config
