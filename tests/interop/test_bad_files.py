"""Weights that can't be read: each a sentence that names what is wrong, before any number is read."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from switchmoe.interop import WeightsError, from_hf, to_hf
from switchmoe.interop.source import SafetensorsFolder
from tests.interop.worlds import RECORDED, copy_of, model_of

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


@pytest.fixture
def unread(monkeypatch):
    """Make reading any number an error."""

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFolder, "read", read)


def changed(folder, change, name="mixtral"):
    """Copy a case with its tensors changed."""
    copy_of(name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(folder, **options):
    with pytest.raises(WeightsError) as caught:
        from_hf(folder, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_missing(tmp_path, unread):
    sentence = refusal(changed(tmp_path / "one", lambda tensors: tensors.pop(ROUTER)))
    assert f"lacks {ROUTER}" in sentence
    sentence = refusal(changed(tmp_path / "expert", lambda tensors: tensors.pop(EXPERT)))
    assert f"lacks {EXPERT}" in sentence

    def half(tensors):
        for name in [name for name in tensors if ".w2." in name]:
            tensors.pop(name)

    assert "and 7 more" in refusal(changed(tmp_path / "many", half))  # of 2 layers with 5 experts


def test_left_over(tmp_path, unread):
    def add(tensors):
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(16, np.float32)

    assert "model.layers.2.input_layernorm.weight" in refusal(changed(tmp_path / "layer", add))
    # A config that asks for less than there is.
    sentence = refusal(copy_of("mixtral", tmp_path / "config", num_local_experts=4))
    assert "gate.weight has shape [5, 16], but needs [4, 16]" in sentence
    # Buffers that older files carry along are passed over.
    noise = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with pytest.raises(AssertionError, match="was read"):
        from_hf(changed(tmp_path / "noise", lambda tensors: tensors.update({noise: np.ones(2, np.float32)})))


def test_misshapen(tmp_path, unread):
    def turn(tensors):
        tensors[EXPERT] = np.ascontiguousarray(tensors[EXPERT].T)

    assert f"{EXPERT} has shape [12, 16], but needs [16, 12]" in refusal(changed(tmp_path / "in", turn))


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01])
def test_cut_short(tmp_path, kept):
    folder = copy_of("mixtral", tmp_path / "in")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * kept)])
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


def test_damaged(tmp_path):
    folder = copy_of("mixtral", tmp_path / "in")
    for content in (b"", b"\xff" * 100, b"\x05" + b"\0" * 7 + b"{xxx}"):
        (folder / "model.safetensors").write_bytes(content)
        assert "model.safetensors is no whole safetensors file" in refusal(folder)


def test_pickles_are_never_opened(tmp_path):
    folder = copy_of("mixtral", tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor" in refusal(folder)


def test_shards(tmp_path):
    to_hf(model_of("mixtral"), tmp_path / "in", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    (tmp_path / "in" / files[1]).rename(tmp_path / "away")
    assert f"has no {files[1]}, one of the {len(files)} files" in refusal(tmp_path / "in")
    (tmp_path / "in" / files[1]).write_bytes((tmp_path / "in" / files[0]).read_bytes())
    assert "is both in" in refusal(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside of its folder" in refusal(tmp_path / "in")
    path.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path / "in")


def test_types(tmp_path, unread):
    def narrow(kind):
        return lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(kind)})

    assert "has the type I8; only F64" in refusal(changed(tmp_path / "int8", narrow(np.int8)))
    assert "float64" in refusal(changed(tmp_path / "wide", narrow(np.float64)))


def test_half_precision_without_a_type_of_ours_is_widened(tmp_path):
    def narrow(tensors):
        tensors.update({name: tensor.astype(np.float16) for name, tensor in tensors.items()})

    model = from_hf(changed(tmp_path / "half", narrow))
    assert model.config.param_dtype == "float32"
    wide = load_file(RECORDED / "mixtral" / "model.safetensors")["model.norm.weight"].astype(np.float16)
    np.testing.assert_array_equal(model.final_norm.scale_D[...], wide)


def test_type_that_is_asked_for(tmp_path):
    model = from_hf(RECORDED / "mixtral", dtype="bfloat16")
    assert model.config.dtype == model.config.param_dtype == "bfloat16"
    router = load_file(RECORDED / "mixtral" / "model.safetensors")[ROUTER]
    np.testing.assert_array_equal(model.blocks.layer_0.feed_forward.router_DE[...][1], router.T)  # float32
    expert = load_file(RECORDED / "mixtral" / "model.safetensors")[EXPERT].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(model.blocks.layer_0.feed_forward.w_out_EFD[...][1, 4], expert.T)
    with pytest.raises(ValueError, match="did you mean bfloat16|did you mean 'bfloat16'"):
        from_hf(RECORDED / "mixtral", dtype="bfloat61")


def test_copies(tmp_path):
    def tied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    from_hf(changed(tmp_path / "same", tied, "llama"))

    def loose(tensors):
        tied(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    assert "lm_head.weight that differs from" in refusal(changed(tmp_path / "loose", loose, "llama"))

    def apart(tensors):
        tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1

    sentence = refusal(changed(tmp_path / "apart", apart, "switch_all_sparse"))
    assert "decoder.embed_tokens.weight that differs from shared.weight" in sentence


def test_no_folder(tmp_path):
    assert "is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[1]")
    assert "holds a JSON list" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "can't be read as JSON" in refusal(tmp_path / "empty")
