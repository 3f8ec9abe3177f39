"""What transformers made of small models, written down, beside what ours make of the same files."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from switchmoe.infer import GenerateConfig, generate
from switchmoe.interop import to_hf
from tests.interop.worlds import NAMES, RECORDED, about, logits_of, model_of, recorded
from tests.quick import compiled_quickly

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("switch")])
def test_logits_where_tokens_are_dropped(name):
    inputs = recorded(name)
    logits, kept, dropped = logits_of(model_of(name), inputs)
    np.testing.assert_allclose(logits[kept], inputs.logits[kept], rtol=0, atol=TOLERANCE)
    assert list(dropped) == about(name)["dropped"] and min(dropped) > 0


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("switch")])
def test_logits_and_greedy_tokens(name):
    # One pass over the prompts and all that transformers added to them: nobody competes for seats here, so a
    # token sees what it saw when it was chosen.
    inputs = recorded(name)
    said = inputs.tokens.shape[1]
    assert len(set(inputs.mask.sum(-1))) > 1  # rows of unequal length
    lengths = inputs.mask.sum(-1)
    rows = [
        np.concatenate([row[:n], more])
        for row, n, more in zip(inputs.ids, lengths, inputs.tokens, strict=True)
    ]
    mask = np.arange(max(map(len, rows))) < (lengths + said)[:, None]
    ids = np.stack([np.pad(row, (0, mask.shape[1] - len(row))) for row in rows])
    logits, _, _ = logits_of(model_of(name), inputs._replace(ids=ids, mask=mask))
    for row, length, wanted, chosen in zip(logits, lengths, inputs.logits, inputs.tokens, strict=True):
        np.testing.assert_allclose(row[:length], wanted[:length], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(row[length - 1 : length - 1 + said].argmax(-1), chosen)


def test_greedy_tokens_one_by_one_behind_an_encoder():
    # Where the prompt's tokens are dropped, and those that come one by one are not.
    inputs = recorded("switch")
    prompts = [row[kept].tolist() for row, kept in zip(inputs.ids, inputs.mask, strict=True)]
    with compiled_quickly():
        said = generate(
            model_of("switch"), prompts, GenerateConfig(max_new_tokens=inputs.tokens.shape[1], start_token=0)
        )
    np.testing.assert_array_equal(said.tokens_BN, inputs.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_gives_transformers_own_file(name, tmp_path):
    to_hf(model_of(name), tmp_path / "out")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (RECORDED / name, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (RECORDED / name, tmp_path / "out")
    )
    tokens = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    free = {"transformers_version", "max_position_embeddings", "head_dim", "rope_theta", *tokens}
    different = {key: (before[key], after[key]) for key in after if key not in free and key in before}
    assert all(old == new for old, new in different.values()), different
