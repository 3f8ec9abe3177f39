"""Switch Transformers in the layout of T5X and flaxformer: flat dictionaries with names joined by "/".

The names are those that Hugging Face's conversion script reads (transformers 4,
convert_switch_transformers_original_flax_checkpoint_to_pytorch.py). No checkpoint of Google's was at hand, so
what is tested is the round trip, and that the script's rules make of our arrays the tensors that transformers
saved. By documentation alone: gated FFNs (wi_0 with the activation, wi_1 without), heads that are apart from
their features, and `decoder/logits_dense` for an untied head. A checkpoint on disk (msgpack, zarr) has to be
opened with T5X first: here it is a dictionary of arrays.

Kernels are [in, out], experts [E, in, out], the table of relative positions [heads, buckets].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from switchmoe.interop.errors import WeightsError
from switchmoe.interop.load import fill
from switchmoe.interop.names import Named, choose_pieces, find_weights
from switchmoe.interop.save import arrays_of, tensors_of
from switchmoe.interop.source import FlatDict
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.config import ComputeType
from switchmoe.parallel import Layout

_PREFIX = "target/"  # in front of the weights, where a checkpoint has the optimizer's state too


def _attention(ours: str, theirs: str) -> dict[str, Named]:
    """Name the four matrices of one attention."""
    return {
        f"{ours}.w_q_DHA": Named(f"{theirs}/query/kernel", "d (h a) -> d h a"),
        f"{ours}.w_k_DNA": Named(f"{theirs}/key/kernel", "d (h a) -> d h a"),
        f"{ours}.w_v_DNA": Named(f"{theirs}/value/kernel", "d (h a) -> d h a"),
        f"{ours}.w_o_HAD": Named(f"{theirs}/out/kernel", "(h a) d -> h a d"),
    }


def _stack(ours: str, theirs: str, attention: str, gated: bool) -> dict[str, Named]:
    """Name what an encoder and a decoder both have; `attention` is what they call their own."""
    layer = theirs + "/layers_{layer}/"
    first, second = ("wi_0", "wi_1") if gated else ("", "wi")
    table = {
        f"{ours}final_norm.scale_D": Named(f"{theirs}/{theirs}_norm/scale", "d -> d"),
        f"{ours}positions.bias_UH": Named(f"{theirs}/relpos_bias/rel_embedding", "h u -> u h"),
        f"{ours}attention_norm.scale_D": Named(f"{layer}pre_{attention}_layer_norm/scale", "d -> d"),
        **_attention(f"{ours}attention", f"{layer}{attention}"),
        f"{ours}feed_forward_norm.scale_D": Named(f"{layer}pre_mlp_layer_norm/scale", "d -> d"),
        f"{ours}feed_forward.router_DE": Named(f"{layer}mlp/router/router_weights/w/kernel", "d e -> d e"),
    }
    matrices = {"w_in_{}DF": (second, "d f -> d f"), "w_out_{}FD": ("wo", "f d -> f d")}
    if gated:
        matrices["w_gate_{}DF"] = (first, "d f -> d f")
    for name, (their_name, axes) in matrices.items():
        dense, sparse = f"{layer}mlp/{their_name}/kernel", f"{layer}mlp/expert/{their_name}/kernel"
        table[f"{ours}feed_forward.{name.format('')}"] = Named(dense, axes)
        table[f"{ours}feed_forward.{name.format('E')}"] = Named("", axes, stacked=sparse)
    return table


def _table(config: LMConfig) -> dict[str, Named]:
    if config.encoder_layers == 0:
        raise WeightsError("this model has no encoder, but T5X's Switch Transformers have one.")
    return {
        "embedding_VD": Named("token_embedder/embedding", "v d -> v d"),
        "head_DV": Named("decoder/logits_dense/kernel", "d v -> d v"),
        **_stack("encoder.", "encoder", "attention", config.gated),
        **_stack("", "decoder", "self_attention", config.gated),
        "cross_attention_norm.scale_D": Named(
            "decoder/layers_{layer}/pre_cross_attention_layer_norm/scale", "d -> d"
        ),
        **_attention("cross_attention", "decoder/layers_{layer}/encoder_decoder_attention"),
    }


def from_t5x(
    arrays: Mapping[str, Any],
    config: LMConfig,
    *,
    dtype: ComputeType | None = None,
    layout: Layout | None = None,
) -> TransformerLM:
    """Make a model of a checkpoint's arrays, in a flat or a nested dictionary.

    Args:
      arrays: by name, with or without "target/" in front; with that, what else is there is passed over. The
        kernels of attention may have heads and their features apart.
      config: the model, such as `switchmoe.models.switch_base(8)`; the checkpoint does not say.
      dtype: of weights and products, in place of the configuration's.
      layout: how the model is stored on a mesh.

    Raises:
      WeightsError: one sentence that names an array that is missing, left over or of another shape.
    """
    flat = _flatten(arrays)
    if any(name.startswith(_PREFIX) for name in flat):
        flat = {name.removeprefix(_PREFIX): a for name, a in flat.items() if name.startswith(_PREFIX)}
    flat = {name: _join_heads(name, np.asarray(array)) for name, array in flat.items()}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    source = FlatDict(flat, "the T5X checkpoint")
    table = _table(config)
    return fill(
        config, source, layout, lambda leaves: choose_pieces(find_weights(config, table, leaves), source)
    )


def to_t5x(model: TransformerLM) -> dict[str, np.ndarray]:
    """Lay a model's weights out as a T5X checkpoint has them, by name and without "target/", in their types.

    Raises:
      WeightsError: the model has weights for which T5X's Switch Transformers have no name.
    """
    arrays = arrays_of(model)
    weights = find_weights(model.config, _table(model.config), arrays)
    laid_out = {}
    for tensor in tensors_of(weights, arrays, None, stacked=True, copies={}):
        parts = [np.asarray(piece).reshape(-1) for piece in tensor.pieces()]
        laid_out[tensor.name] = np.concatenate(parts).astype(tensor.dtype).reshape(tensor.shape)
    return laid_out


def _flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _join_heads(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 3 or "expert" in name:
        return array
    first, _, last = array.shape
    return array.reshape(-1, last) if name.endswith("/out/kernel") else array.reshape(first, -1)
