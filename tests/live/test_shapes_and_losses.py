"""Published sizes without weights, forms of files, padding in front, and what the docs say of losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from switchmoe import models
from switchmoe.interop import from_hf
from switchmoe.interop.families import write_config
from switchmoe.interop.load import names_of
from switchmoe.interop.names import find_weights
from tests.interop.worlds import same_weights
from tests.live.cases import make, pad_in_front, settle

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to fix


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def _seated(config):
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_capacity=64))


PUBLISHED = {
    "switch-base-8": _seated(models.switch_base(8)),
    "switch-base-256": _seated(models.switch_base(256)),
    "switch-large-128": _seated(models.switch_large(128)),
    "mixtral-8x7b": models.mixtral_8x7b(),
    "olmoe-1b-7b": models.olmoe_1b_7b(),
    "qwen3-30b-a3b": models.qwen3_30b_a3b(),
    "llama3-8b": models.llama3_8b(),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_and_shape_at_published_sizes(name):
    config = PUBLISHED[name]
    family, settings = write_config(config, "float32")
    with torch.device("meta"):
        theirs = getattr(transformers, family.architecture)(
            transformers.AutoConfig.for_model(**settings)
        ).state_dict()
    model = nnx.eval_shape(lambda: models.TransformerLM(config, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = {names_of(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    # As transformers has them in memory: all experts of a layer in one.
    ours = {}
    for weight in find_weights(config, family.table, leaves):
        ours |= {piece.name: piece.tensor for piece in weight.ways[-1]}
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.items() if key not in family.copies}
    if not config.tie_embeddings:
        wanted["lm_head.weight"] = tuple(theirs["lm_head.weight"].shape)
    assert ours == wanted


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_files_with_stacked_experts(name, tmp_path):
    model = make(name, 0)
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stacked = from_hf(tmp_path / "stacked")
    same_weights(from_hf(tmp_path / "published"), stacked)


@pytest.mark.parametrize("name", ["mixtral_window", "olmoe", "qwen3_moe", "llama"])
def test_padding_in_front(name, tmp_path):
    model, inputs, _ = settle(name)
    model.save_pretrained(tmp_path / "in")
    ids, mask = (pad_in_front(array, inputs.mask) for array in (inputs.ids, inputs.mask))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits
    ours = np.asarray(from_hf(tmp_path / "in")(jnp.asarray(ids), mask_BS=jnp.asarray(mask))[0])
    np.testing.assert_allclose(ours[mask], theirs.numpy()[mask], rtol=0, atol=1e-4)


def test_their_balance_losses_are_k_and_pooled_over_layers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func as of_switch,
    )

    # Token t likes experts t and t + 1 best: two choices of 8 experts, perfectly even.
    even = torch.eye(8) * 20 + torch.roll(torch.eye(8), 1, dims=1) * 19
    assert of_mixtral((even,), num_experts=8, top_k=2).item() == pytest.approx(2.0, abs=0.01)
    # A layer that only knows experts 0 and 1, one that only knows 2 and 3, ...: each is far from even, all
    # together are even again.
    lopsided = tuple(torch.zeros(8, 8).index_fill(1, torch.tensor([i, i + 1]), 20.0) for i in (0, 2, 4, 6))
    assert of_mixtral(lopsided, num_experts=8, top_k=2).item() == pytest.approx(2.0, abs=0.01)
    assert of_mixtral(lopsided[:1], num_experts=8, top_k=2).item() == pytest.approx(8.0, abs=0.01)
    # Switch: each row by itself. Two rows of one expert each are even together, and not apart.
    rows = torch.stack([torch.tensor([20.0, 0.0]).expand(4, 2), torch.tensor([0.0, 20.0]).expand(4, 2)])
    probs = torch.softmax(rows, -1)
    assert of_switch(probs, rows.argmax(-1)).item() == pytest.approx(2.0, abs=0.01)
