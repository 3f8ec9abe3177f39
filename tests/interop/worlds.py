"""What transformers made of small models, as tests/live/record.py wrote it down, and ours beside it."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from switchmoe.interop import from_hf
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.nn import BalanceBias
from tests.quick import compiled_quickly

RECORDED = Path(__file__).parent / "recorded"
NAMES = sorted(path.name for path in RECORDED.iterdir())


class Recorded(NamedTuple):
    """A recorded case; the decoder's rows are None without an encoder."""

    ids: np.ndarray
    mask: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    decoder_ids: np.ndarray | None = None
    decoder_mask: np.ndarray | None = None


@functools.cache
def recorded(name: str) -> Recorded:
    """Read what transformers answered."""
    return Recorded(**load_file(RECORDED / name / "answers.safetensors"))


def about(name: str) -> dict[str, Any]:
    """Read what else was written down of a case."""
    return json.loads((RECORDED / name / "record.json").read_text())


@functools.cache
def model_of(name: str) -> TransformerLM:
    """Read a case's model, once."""
    return from_hf(RECORDED / name)


def random_model(config: LMConfig, seed: int = 0) -> TransformerLM:
    """Make a model of a configuration without compiling how its weights are drawn."""
    abstract = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    graph, shapes, _ = nnx.split(abstract, (nnx.Param, BalanceBias), ...)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map(draw, nnx.to_pure_dict(shapes)))


def logits_of(model: TransformerLM, inputs: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Run a model over a case's rows: logits, where they are of no padding, tokens dropped in both stacks."""
    graph, state = nnx.split(model)
    rows = {name: jnp.asarray(array) for name, array in inputs._asdict().items() if array is not None}

    def run(state, rows):
        model = nnx.merge(graph, state)
        if inputs.decoder_ids is None:
            return model(rows["ids"], mask_BS=rows["mask"])
        return model(
            rows["decoder_ids"],
            source_BP=rows["ids"],
            source_mask_BP=rows["mask"],
            mask_BS=rows["decoder_mask"],
        )

    with compiled_quickly():
        logits, aux = jax.jit(run)(state, rows)
    dropped = np.zeros(1) if aux is None else np.asarray(aux.dropped)
    encoder = model.config.encoder.num_super_blocks if inputs.decoder_ids is not None else 0
    return (
        np.asarray(logits),
        inputs.mask if inputs.decoder_mask is None else inputs.decoder_mask,
        (int(dropped[:encoder].sum()), int(dropped[encoder:].sum())),
    )


def copy_of(name: str, folder: Path, **settings: Any) -> Path:
    """Copy a case's configuration and weights into a folder, with other settings; None takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((RECORDED / name / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None or key not in settings}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "model.safetensors").write_bytes((RECORDED / name / "model.safetensors").read_bytes())
    return folder


def same_weights(one: TransformerLM, other: TransformerLM) -> None:
    """Make sure that two models are the same, to the bit."""
    assert one.config == other.config
    before, after = (nnx.to_pure_dict(nnx.state(model)) for model in (one, other))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for (path, weight), found in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert weight.dtype == found.dtype, path
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(found), err_msg=str(path))
