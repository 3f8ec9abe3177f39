"""What is written: complete or not at all, in shards, as the safetensors library reads it, and read back."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from switchmoe.infer import prepare
from switchmoe.interop import WeightsError, from_hf, save, to_hf
from tests.interop.worlds import NAMES, model_of, same_weights


@pytest.mark.parametrize("stacked", [False, True], ids=["published", "stacked"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_in_shards(name, stacked, tmp_path):
    model = model_of(name)
    to_hf(model, tmp_path / "out", stacked=stacked, max_shard_bytes=9_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for file in {*index["weight_map"].values()}:
        with safe_open(tmp_path / "out" / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]
            assert all(index["weight_map"][key] == file for key in opened.keys())
        total += sum(sizes)
        assert sum(sizes) <= 9_000 or len(sizes) == 1
    assert total == index["metadata"]["total_size"]
    experts = sum(".experts." in key for key in index["weight_map"])
    if model.config.moe is not None:
        # Three matrices an expert, or two tensors for all of a layer; Switch has no name for all at once.
        one_by_one = 2 if model.config.encoder_layers else 3 * model.config.num_super_blocks
        if not model.config.encoder_layers:
            both = (one_by_one * model.config.moe.num_experts, 2 * model.config.num_super_blocks)
            assert experts == both[stacked]
    same_weights(model, from_hf(tmp_path / "out"))


def test_separate_layers(tmp_path):
    # The other form a model can have its layers in, to and fro.
    to_hf(model_of("switch"), tmp_path / "out")
    separate = from_hf(tmp_path / "out", scan_layers=False)
    block = separate.encoder.blocks.block_1.layer_1.feed_forward
    stacked = model_of("switch").encoder.blocks.layer_1.feed_forward
    np.testing.assert_array_equal(block.w_in_EDF[...], stacked.w_in_EDF[...][1])
    to_hf(separate, tmp_path / "back")
    same_weights(model_of("switch"), from_hf(tmp_path / "back"))


def test_narrow_and_wide(tmp_path):
    narrow = from_hf(_written(tmp_path / "narrow", dtype="bfloat16"))
    assert narrow.config.param_dtype == "bfloat16"
    to_hf(narrow, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "narrow" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    wide = from_hf(_written(tmp_path / "wide", model=narrow, dtype="float32"))
    np.testing.assert_array_equal(wide.embedding_VD[...], narrow.embedding_VD[...].astype(jnp.float32))


def _written(folder, model=None, **options):
    to_hf(model or model_of("mixtral"), folder, **options)
    return folder


def test_settings_that_a_model_has_not(tmp_path):
    settings = json.loads((_written(tmp_path / "a") / "config.json").read_text())
    assert settings["eos_token_id"] is None
    extra = {"eos_token_id": 2, "max_position_embeddings": 77}
    settings = json.loads((_written(tmp_path / "b", extra=extra) / "config.json").read_text())
    assert settings["eos_token_id"] == 2 and settings["max_position_embeddings"] == 77


def test_never_over_anything(tmp_path):
    _written(tmp_path / "empty" / "new")  # folders on the way are made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(WeightsError, match="is not empty; give another folder, or overwrite=True"):
        _written(tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file"):
        _written(tmp_path / "file", overwrite=True)
    assert (tmp_path / "full" / "precious").read_text() == "x"
    _written(tmp_path / "full", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    (tmp_path / "bare").mkdir()
    _written(tmp_path / "bare")
    # A run, or a folder above what is read.
    with pytest.raises(WeightsError, match="has the folder bare in it"):
        _written(tmp_path, overwrite=True)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_if_the_last_step_fails(error, tmp_path, monkeypatch):
    _written(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self, to):
        if self.name == "new":
            raise error("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="no"):
        _written(tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_place_and_no_weights(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="no folder can be made in"):
        _written(tmp_path / "file" / "out")
    with pytest.raises(WeightsError, match="laid out for generating"):
        _written(tmp_path / "out", model=prepare(model_of("mixtral")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", [False, True])
def test_nothing_half_written(there, tmp_path, monkeypatch):
    if there:
        _written(tmp_path / "out", dtype="bfloat16")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
    written = []

    def fail_late(values, piece):
        written.append(piece)
        if len(written) == 30:
            raise OSError("no space left on device")
        return turn_back(values, piece)

    turn_back = save.turn_back
    monkeypatch.setattr(save, "turn_back", fail_late)
    with pytest.raises(OSError, match="no space"):
        _written(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there
    if there:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
