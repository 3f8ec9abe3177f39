"""Flax NNX modules: the sparse layer, and the parts of a Transformer around it."""

from switchmoe.nn.attention import Attention, causal_mask
from switchmoe.nn.block import Block, BlockOutput, drop_features
from switchmoe.nn.cache import KeysValues, LayerCache
from switchmoe.nn.mlp import MLP
from switchmoe.nn.moe import BalanceBias, MoE
from switchmoe.nn.norm import RMSNorm, rms_norm
from switchmoe.nn.positions import RelativePositions, bucket_distances, rotate
from switchmoe.nn.remat import RematPolicy, rematerialize

__all__ = [
    "MLP",
    "Attention",
    "BalanceBias",
    "Block",
    "BlockOutput",
    "KeysValues",
    "LayerCache",
    "MoE",
    "RMSNorm",
    "RelativePositions",
    "RematPolicy",
    "bucket_distances",
    "causal_mask",
    "drop_features",
    "rematerialize",
    "rms_norm",
    "rotate",
]
