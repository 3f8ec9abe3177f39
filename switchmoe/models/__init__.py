"""Language models, their named shapes, and what they cost."""

from switchmoe.models.cache import Cache
from switchmoe.models.config import LMConfig
from switchmoe.models.flops import dense_twin, flops_per_token, param_count
from switchmoe.models.named import base_lm, small_lm, small_switch, tiny_lm, tiny_switch
from switchmoe.models.published import (
    llama3_8b,
    mixtral_8x7b,
    olmoe_1b_7b,
    qwen3_30b_a3b,
    switch_base,
    switch_c,
    switch_large,
    switch_xxl,
)
from switchmoe.models.rebuild import unroll, with_config, with_moe
from switchmoe.models.super_block import SuperBlock
from switchmoe.models.tokens import check_tokens
from switchmoe.models.transformer import TransformerLM

__all__ = [
    "Cache",
    "LMConfig",
    "SuperBlock",
    "TransformerLM",
    "base_lm",
    "check_tokens",
    "dense_twin",
    "flops_per_token",
    "llama3_8b",
    "mixtral_8x7b",
    "olmoe_1b_7b",
    "param_count",
    "qwen3_30b_a3b",
    "small_lm",
    "small_switch",
    "switch_base",
    "switch_c",
    "switch_large",
    "switch_xxl",
    "tiny_lm",
    "tiny_switch",
    "unroll",
    "with_config",
    "with_moe",
]
