"""Fewer experts: those that a text uses are kept, the others are left out."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.data import Batch
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.parallel import dimensions
from switchmoe.shapes import Float, Int
from switchmoe.transfer.trees import Params, refuse_separate_blocks, replace_stacks, stacks

# What these read of an expert's number goes beyond its weights.
_BY_NUMBER = ("hash",)


def expert_load(model: TransformerLM, batches: Iterable[Batch]) -> Float[np.ndarray, "L E"]:
    """Count how often the tokens of some batches choose each expert of each layer, in evaluation.

    A token with k choices counts k times. Layers of an encoder come first.

    Raises:
      ValueError: the model is dense, or there is no batch.
    """
    if model.config.moe is None:
        raise ValueError("the model is dense, so there is no expert to count tokens at.")

    @nnx.jit
    def count(model: TransformerLM, inputs: dict[str, Any]) -> Any:
        _, aux = model(**inputs)
        assert aux is not None  # since it is sparse
        return aux.load_E

    read = ("ids_BS", "source_BP", "source_mask_BP", "segments_BS", "positions_BS", "mask_BS")
    load_LE = None
    for batch in batches:
        inputs = {name: getattr(batch, name) for name in read if getattr(batch, name) is not None}
        part_LE = np.asarray(count(model, inputs), np.float64)
        load_LE = part_LE if load_LE is None else load_LE + part_LE
    if load_LE is None:
        raise ValueError("there is no batch to count the tokens of; give at least one.")
    return load_LE


def busiest(load_LE: Float[np.ndarray, "L E"], *, keep: int) -> Int[np.ndarray, "L K"]:
    """Name the `keep` experts of each layer that are chosen most, in the order of their numbers.

    Raises:
      ValueError: there are not so many.
    """
    if not 1 <= keep <= load_LE.shape[1]:
        raise ValueError(f"{keep} experts of {load_LE.shape[1]} can't be kept; give a number in between.")
    most_LK = np.argsort(-load_LE, axis=1, kind="stable")[:, :keep]
    return np.sort(most_LK, axis=1)


def prune_experts(
    params: Params, config: LMConfig, experts_LK: Int[np.ndarray, "L K"]
) -> tuple[Params, LMConfig]:
    """Leave every layer only the experts that are named, and the router only the scores of these.

    A token whose expert is left out goes to the best of those that stay; probabilities are over these alone.
    Layers of an encoder come first in `experts_LK`.

    Returns:
      The weights and the config of the smaller model.

    Raises:
      ValueError: one sentence, if the model is dense, an expert is not there or named twice, fewer are left
        than a token is sent to, or the router does not score experts one by one.
    """
    refuse_separate_blocks(config)
    moe = config.moe
    if moe is None:
        raise ValueError("the model is dense, so there is no expert to leave out.")
    _check_named(moe, experts_LK)
    keep = experts_LK.shape[1]
    smaller = dataclasses.replace(config, moe=dataclasses.replace(moe, num_experts=keep))
    blocks, first = [], 0
    for stack, own in stacks(params, config):
        last, count = f"layer_{own.moe_every - 1}", own.num_super_blocks
        own_LK = experts_LK[first : first + count]
        if len(own_LK) != count or (stack is params and len(experts_LK) != first + count):
            raise ValueError(
                f"experts are named for {len(experts_LK)} layers, but the model has another number of sparse "
                "ones; name some for each."
            )
        first += count
        block = stack["blocks"][last]
        blocks.append({**stack["blocks"], last: {**block, "feed_forward": _select(block, own_LK, moe)}})
    return replace_stacks(params, blocks), smaller


def _check_named(moe: MoEConfig, experts_LK: Int[np.ndarray, "L K"]) -> None:
    if moe.router in _BY_NUMBER:
        raise ValueError(
            f"router={moe.router!r} sends tokens to experts by their numbers, which would change."
        )
    if moe.expert_groups > 1:
        raise ValueError(
            f"the router chooses within expert_groups={moe.expert_groups}, which leaving out experts would "
            "form anew; only a model without groups can be pruned."
        )
    keep = experts_LK.shape[1]
    if keep < moe.top_k:
        raise ValueError(f"a token is sent to top_k={moe.top_k} experts, so {keep} are too few to keep.")
    in_order_LK = np.sort(experts_LK, axis=1)
    if in_order_LK.min() < 0 or in_order_LK.max() >= moe.num_experts or not np.diff(in_order_LK).all():
        raise ValueError(
            f"the experts to keep must be different ones of 0 to {moe.num_experts - 1} in every layer."
        )


def _select(block: Params, experts_LK: Int[np.ndarray, "L K"], moe: MoEConfig) -> Params:
    """Take the named experts out of every weight of a stack's sparse layers that has experts in it."""

    def take(path: tuple[Any, ...], weight: Any) -> Any:
        dims = dimensions(path)
        if "E" not in dims or path[-1].key.startswith("shared_"):
            return weight
        axis = weight.ndim - len(dims) + dims.index("E")
        index = experts_LK.reshape(
            len(experts_LK), *([1] * (axis - 1)), -1, *([1] * (weight.ndim - axis - 1))
        )
        return jax.numpy.take_along_axis(jax.numpy.asarray(weight), index, axis=axis)

    return jax.tree.map_with_path(take, block["feed_forward"])
