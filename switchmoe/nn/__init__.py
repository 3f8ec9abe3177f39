"""Flax NNX modules: the sparse layer, and the parts of a Transformer around it."""

from switchmoe.nn.attention import Attention, causal_mask, rotate
from switchmoe.nn.block import Block, drop_features
from switchmoe.nn.mlp import MLP
from switchmoe.nn.moe import BalanceBias, MoE
from switchmoe.nn.norm import RMSNorm, rms_norm
from switchmoe.nn.remat import RematPolicy, rematerialize

__all__ = [
    "MLP",
    "Attention",
    "BalanceBias",
    "Block",
    "MoE",
    "RMSNorm",
    "RematPolicy",
    "causal_mask",
    "drop_features",
    "rematerialize",
    "rms_norm",
    "rotate",
]
