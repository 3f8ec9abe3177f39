"""Language models, their named shapes, and what they cost."""

from switchmoe.models.config import LMConfig
from switchmoe.models.decoder import SuperBlock, TransformerLM
from switchmoe.models.flops import dense_twin, flops_per_token, param_count
from switchmoe.models.named import base_lm, small_lm, tiny_lm
from switchmoe.models.tokens import check_tokens

__all__ = [
    "LMConfig",
    "SuperBlock",
    "TransformerLM",
    "base_lm",
    "check_tokens",
    "dense_twin",
    "flops_per_token",
    "param_count",
    "small_lm",
    "tiny_lm",
]
