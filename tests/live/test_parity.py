"""Our models beside transformers', with the same random weights: logits, greedy tokens, and the way back."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers

from switchmoe.infer import GenerateConfig, generate
from switchmoe.interop import from_hf, to_hf
from tests.interop.worlds import logits_of
from tests.live.cases import CASES, NEW_TOKENS, prompts_of, settle

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to fix
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give the folder that transformers saved a case to, its inputs and its answers; drawn once."""

    @functools.cache
    def save(name):
        model, inputs, answers = settle(name)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="20KB")
        return folder, inputs, answers, model

    return save


@pytest.mark.parametrize("name", CASES)
def test_logits(name, saved):
    folder, inputs, answers, _ = saved(name)
    logits, kept, dropped = logits_of(from_hf(folder), inputs)
    np.testing.assert_allclose(logits[kept], answers.logits[kept], rtol=0, atol=TOLERANCE)
    assert dropped == answers.dropped


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name, saved):
    folder, inputs, answers, _ = saved(name)
    said = generate(from_hf(folder), prompts_of(inputs), GenerateConfig(max_new_tokens=NEW_TOKENS))
    np.testing.assert_array_equal(said.tokens_BN, answers.tokens)


@pytest.mark.parametrize("stacked", [False, True], ids=["published", "stacked"])
@pytest.mark.parametrize("name", CASES)
def test_the_way_back(name, stacked, saved, tmp_path):
    folder, inputs, answers, theirs = saved(name)
    to_hf(from_hf(folder), tmp_path / "out", stacked=stacked, max_shard_bytes=20_000)
    loaded, about = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about.values()), about
    before, after = theirs.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert torch.equal(weight, after[key]), key
    options = {}
    if inputs.decoder_ids is not None:
        options["decoder_input_ids"] = torch.tensor(inputs.decoder_ids).long()
        options["decoder_attention_mask"] = torch.tensor(inputs.decoder_mask).long()
    with torch.no_grad():
        logits = loaded.eval()(
            input_ids=torch.tensor(inputs.ids).long(),
            attention_mask=torch.tensor(inputs.mask).long(),
            **options,
        ).logits
    np.testing.assert_array_equal(logits.numpy(), answers.logits)


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_weights_of_half_precision_are_kept(name, saved, tmp_path):
    *_, theirs = saved(name)
    narrow = type(theirs)(copy.deepcopy(theirs.config))
    narrow.load_state_dict(theirs.state_dict())
    narrow.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    ours = from_hf(tmp_path / "in")
    assert ours.config.param_dtype == ours.config.dtype == "bfloat16"
    to_hf(ours, tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    for key, weight in narrow.state_dict().items():
        assert torch.equal(weight, back.state_dict()[key]), key


@pytest.mark.parametrize("name", CASES)
def test_settings_come_back(name, saved, tmp_path):
    folder, _, _, theirs = saved(name)
    given = theirs.config.to_dict()
    # No part of a model of ours: what it is trained with, and that a head's size follows from others.
    free = {
        "max_position_embeddings",
        "_name_or_path",
        "transformers_version",
        "initializer_range",
        "head_dim",
    }
    extra = {key: given[key] for key in ("pad_token_id", "decoder_start_token_id") if key in given}
    to_hf(from_hf(folder), tmp_path / "out", extra=extra)
    back = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {
        key: (given.get(key), back.get(key)) for key in given.keys() | back.keys() if key not in free
    } == {key: (value, value) for key, value in given.items() if key not in free}
