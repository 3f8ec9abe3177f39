"""Weights that a run is given: those it starts from, and a teacher's. They are part of what the run is."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np

from switchmoe.models import LMConfig
from switchmoe.parallel import Layout
from switchmoe.train.checks import check_matmul, check_mesh
from switchmoe.train.config import TrainConfig, TuneConfig, model_identity
from switchmoe.train.errors import RunError
from switchmoe.train.model import Params, adapted_model, pure_model

_SHOWN = 3


class Teacher(NamedTuple):
    """A model whose opinion of the text a student learns.

    Attributes:
      params: its weights, as `load_params` reads them.
      config: its shape.
    """

    params: Params
    config: LMConfig


class Given(NamedTuple):
    """What a run is given beside its configuration; None for what it isn't."""

    start: Params | None = None
    teacher: Teacher | None = None


def fingerprint(params: Params, config: LMConfig | None = None) -> str:
    """Name weights, and the model they are of where that is given, in 16 hexadecimal digits.

    Every name, type, shape and bit counts. One weight at a time is brought to the host.
    """
    digest = hashlib.sha256()
    if config is not None:
        digest.update(json.dumps(model_identity(config), sort_keys=True).encode())
    for path, weight in sorted(jax.tree.leaves_with_path(params), key=lambda leaf: str(leaf[0])):
        whole = np.ascontiguousarray(weight)
        digest.update(f"{jax.tree_util.keystr(path)} {whole.dtype} {whole.shape}".encode())
        digest.update(whole.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def with_given(config: TrainConfig, given: Given) -> TrainConfig:
    """Write the fingerprints of what a run is given into its configuration, and so into its name.

    Raises:
      RunError: the configuration has a fingerprint of something else.
    """
    start, teacher = given
    found = {
        "weights": None if start is None else fingerprint(start),
        "teacher": None if teacher is None else fingerprint(*teacher),
    }
    if teacher is None and config.tune.soft_share != TuneConfig().soft_share:
        raise RunError(
            f"tune.soft_share is {config.tune.soft_share}, but there is no teacher; leave it alone, or use "
            "experiments/distill.py."
        )
    whats = {"weights": "weights to start from", "teacher": "teacher"}
    for field, what in whats.items():
        wanted = getattr(config.tune, field)
        if wanted is not None and wanted != found[field]:
            there = "there is none" if found[field] is None else f"the one given is {found[field]}"
            raise RunError(
                f"tune.{field} asks for the {what} with the fingerprint {wanted}, but {there}; "
                f"leave tune.{field} alone and give the {what} themselves."
            )
    return dataclasses.replace(config, tune=dataclasses.replace(config.tune, **found))


def check_given(config: TrainConfig, given: Given, layout: Layout | None) -> None:
    """Make sure that given weights are those of the models they are for, and that a teacher can teach here.

    Raises:
      ValueError: one sentence, naming up to three weights that don't fit.
    """
    start, teacher = given
    # Adapters have to fit too, with weights given or not.
    jax.eval_shape(adapted_model(pure_model(config.model), config.tune).init, jax.random.key(0))
    if start is not None:
        check_weights(start, config.model, "the weights to start from")
    if teacher is None:
        return
    check_weights(teacher.params, teacher.config, "the teacher's weights")
    if teacher.config.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"the teacher has {teacher.config.vocab_size} tokens and the student {config.model.vocab_size}; "
            "they must read the same tokens, so take another teacher or set model.vocab_size."
        )
    try:
        tune = dataclasses.replace(config.tune, part="all", lora_rank=8, lora_alpha=16.0)
        taught = dataclasses.replace(config, model=teacher.config, tune=tune)
        check_mesh(taught, layout)
        check_matmul(taught)
    except ValueError as error:
        raise ValueError(f"the teacher does not fit this run: {error}") from error


def check_weights(params: Params, config: LMConfig, what: str) -> None:
    """Compare a tree of weights with what a model has.

    Raises:
      ValueError: one is missing, too many, of another shape, or not of numbers with a point.
    """
    wanted = _flat(jax.eval_shape(pure_model(config).init, jax.random.key(0)))
    found = _flat(params)
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is none of the model's" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(found[name].shape)} there and {list(wanted[name].shape)} in the model"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{what} are not those of the model ({', '.join(wrong[:_SHOWN])}{more}); "
            "leave the settings that make up the model's shape alone, or take other weights."
        )
    strange = [name for name, weight in found.items() if not jax.numpy.issubdtype(weight.dtype, np.floating)]
    if strange:
        raise ValueError(
            f"{what} hold {found[strange[0]].dtype} in {strange[0]}, which can't be trained; "
            "take the model from before it was quantized."
        )


def _flat(params: Params) -> dict[str, Any]:
    return {
        ".".join(str(key.key) for key in path): weight for path, weight in jax.tree.leaves_with_path(params)
    }
