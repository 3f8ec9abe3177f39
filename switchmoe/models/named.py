"""Named language models, each derived from another; `dense_twin` of one gives its FLOP-matched dense twin."""

import dataclasses

from switchmoe.config import MoEConfig
from switchmoe.models.config import LMConfig

_TINY_MOE = MoEConfig(d_model=64, d_ff=256, num_experts=8, drop_order="token")


def tiny_lm() -> LMConfig:
    """A model that trains in seconds on a laptop: 2 layers of 64 features, one of them with 8 experts."""
    return LMConfig(
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        d_ff=256,
        moe=_TINY_MOE,
        moe_every=2,
    )


def small_lm() -> LMConfig:
    """A model for minutes on a laptop: 4 layers of 256 features, two with 8 experts, 10M parameters."""
    return dataclasses.replace(
        tiny_lm(),
        d_model=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        d_ff=1024,
        moe=dataclasses.replace(_TINY_MOE, d_model=256, d_ff=1024),
    )


def base_lm() -> LMConfig:
    """A decoder of Switch-Base's sizes for a GPU: 12 layers of 768 features, 6 with 64 experts, bfloat16."""
    return dataclasses.replace(
        small_lm(),
        d_model=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        d_ff=3072,
        moe=dataclasses.replace(_TINY_MOE, d_model=768, d_ff=3072, num_experts=64),
        dtype="bfloat16",
        remat="dots",
    )


def tiny_switch() -> LMConfig:
    """A Switch Transformer with an encoder for seconds on a laptop: 2 + 2 layers of 64 features."""
    return _like_switch(tiny_lm())


def small_switch() -> LMConfig:
    """The same for minutes on a laptop: 4 + 4 layers of 256 features, half of them with 8 experts."""
    return _like_switch(small_lm())


def _like_switch(decoder: LMConfig) -> LMConfig:
    """Put an encoder of as many layers in front, and do the rest as T5 does; the bytes get sentinels."""
    return dataclasses.replace(
        decoder,
        vocab_size=384,
        encoder_layers=decoder.num_layers,
        num_kv_heads=decoder.num_heads,
        positions="relative",
        scale_scores=False,
        scale_head=True,
    )
