"""Loads weights onto meshes of eight simulated devices; run by test_meshes.py, in a process of its own."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from switchmoe.interop import from_hf, source, to_hf
from switchmoe.parallel import Layout, make_mesh, stored_as
from tests.interop.worlds import RECORDED, random_model

folder = Path(os.environ["WORK"])
read = {}
plain_read = source.SafetensorsFolder.read


def count(self, name, part):
    values = plain_read(self, name, part)
    read[name] = read.get(name, 0) + values.nbytes
    return values


source.SafetensorsFolder.read = count


def check(where: Path, mesh: tuple[int, ...]) -> None:
    """Compare a model on a mesh with the same on one device: values, places, what was read, logits."""
    single = from_hf(where)
    read.clear()
    layout = Layout(make_mesh(*mesh))
    spread = from_hf(where, layout=layout)
    wanted = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(single)))
    found = jax.tree.leaves(nnx.to_pure_dict(nnx.state(spread)))
    for (path, weight), other in zip(wanted, found, strict=True):
        assert other.sharding == layout.sharding(stored_as(layout, path, weight.ndim)), path
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(other), err_msg=str(path))
    sizes = {name: tensor.nbytes for name, tensor in load_file(where / "model.safetensors").items()}
    experts = [name for name in sizes if ".experts." in name]
    assert experts and all(read[name] == sizes[name] for name in experts), "experts are read once"
    expert = spread.blocks.layer_0.feed_forward.w_in_EDF[...]
    assert expert.addressable_shards[0].data.size * layout.size(("expert", "fsdp", "tensor")) == expert.size
    stacked = any("gate_up_proj" in name for name in sizes)
    to_hf(spread, folder / "back", stacked=stacked, overwrite=True)
    again = load_file(folder / "back" / "model.safetensors")
    for name, tensor in load_file(where / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


# The recorded Mixtral has 5 experts; one of 4, with sizes that all axes divide.
config = from_hf(RECORDED / "mixtral").config
config = replace(config, vocab_size=64, moe=replace(config.moe, num_experts=4))
to_hf(random_model(config), folder / "four")
for mesh in [(2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 1, 2)]:
    check(folder / "four", mesh)
to_hf(from_hf(folder / "four"), folder / "stacked", stacked=True)
check(folder / "stacked", (1, 2, 2, 2))
print("done")
