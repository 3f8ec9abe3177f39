"""Published language models by name, as shapes: each a function, most of them derived from another.

They compute in bfloat16 with float32 parameters, which is for training; `dataclasses.replace` with
param_dtype="bfloat16" keeps what the published weights have. Parameters are counted in tests.
"""

import dataclasses

from switchmoe.config import MoEConfig
from switchmoe.models.config import LMConfig


def switch_base(num_experts: int = 8) -> LMConfig:
    """Switch-Base: T5-Base with a sparse FFN in every other layer; 7.4B parameters at 128 experts.

    Published with 8, 16, 32, 64, 128 and 256 experts. The vocabulary is T5's 32,100 ids and 28 that pad it.
    Source: Fedus, Zoph & Shazeer 2021, table 9, https://arxiv.org/abs/2101.03961.
    """
    return LMConfig(
        vocab_size=32128,
        d_model=768,
        num_layers=12,
        encoder_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        d_ff=3072,
        moe=MoEConfig(d_model=768, d_ff=3072, num_experts=num_experts, drop_order="token", jitter=0.01),
        moe_every=2,
        positions="relative",
        scale_scores=False,
        scale_head=True,
        dtype="bfloat16",
        remat="dots",
    )


def switch_large(num_experts: int = 128) -> LMConfig:
    """Switch-Large: T5-Large with a sparse FFN in every other layer; 26.3B parameters at 128 experts."""
    return _resize(
        switch_base(num_experts), d_model=1024, d_ff=4096, num_layers=24, encoder_layers=24, num_heads=16
    )


def switch_xxl(num_experts: int = 128) -> LMConfig:
    """Switch-XXL: gated FFNs, an untied head, a sparse FFN in every other layer; 395B parameters.

    The paper's table 9 says 64 experts, which would be 201B; its 395B and the published weights have 128.
    """
    wide = _resize(
        switch_base(num_experts), d_model=4096, d_ff=10240, num_layers=24, encoder_layers=24, num_heads=64
    )
    assert wide.moe is not None
    moe = dataclasses.replace(wide.moe, activation="gelu", gated=True)
    return dataclasses.replace(
        wide, moe=moe, activation="gelu", gated=True, tie_embeddings=False, scale_head=False
    )


def switch_c(num_experts: int = 2048) -> LMConfig:
    """Switch-C: every FFN sparse, with 2,048 experts; 1,571B parameters."""
    return _resize(
        switch_base(num_experts),
        d_model=2080,
        d_ff=6144,
        num_heads=32,
        num_layers=15,
        encoder_layers=15,
        moe_every=1,
    )


def llama3_8b() -> LMConfig:
    """Llama 3 8B, dense: 8.0B parameters. Source: its config.json, https://huggingface.co/meta-llama."""
    return LMConfig(
        vocab_size=128256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14336,
        moe_every=1,
        rope_theta=500000.0,
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="dots",
    )


def mixtral_8x7b() -> LMConfig:
    """Mixtral 8x7B: every FFN 8 experts, of which a token takes 2; 46.7B parameters, 12.9B of them active.

    Source: Jiang et al. 2024, table 1, https://arxiv.org/abs/2401.04088.
    """
    moe = MoEConfig(
        d_model=4096,
        d_ff=14336,
        num_experts=8,
        router="top_k",
        top_k=2,
        renormalize=True,
        dispatch="dropless",
        activation="silu",
        gated=True,
        init_scale=1.0,
    )
    return dataclasses.replace(llama3_8b(), vocab_size=32000, rope_theta=1e6, moe=moe)


def olmoe_1b_7b() -> LMConfig:
    """OLMoE-1B-7B: 64 experts, of which a token takes 8, their weights not renormalised; 6.9B and 1.3B.

    Source: Muennighoff et al. 2024, table 1, https://arxiv.org/abs/2409.02060.
    """
    mixtral = mixtral_8x7b()
    assert mixtral.moe is not None
    moe = dataclasses.replace(
        mixtral.moe, d_model=2048, d_ff=1024, num_experts=64, top_k=8, renormalize=False, z_coef=1e-3
    )
    return dataclasses.replace(
        mixtral,
        vocab_size=50304,
        d_model=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        d_ff=1024,
        moe=moe,
        rope_theta=10000.0,
        qk_norm="full",
    )


def qwen3_30b_a3b() -> LMConfig:
    """Qwen3-30B-A3B: 128 experts, of which a token takes 8; 30.5B parameters, 3.3B of them active.

    Source: Qwen team 2025, table 2, https://arxiv.org/abs/2505.09388.
    """
    mixtral = mixtral_8x7b()
    assert mixtral.moe is not None
    moe = dataclasses.replace(
        mixtral.moe, d_model=2048, d_ff=768, num_experts=128, top_k=8, balance_coef=1e-3, balance_over="batch"
    )
    return dataclasses.replace(
        mixtral,
        vocab_size=151936,
        d_model=2048,
        num_layers=48,
        num_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        moe=moe,
        norm_eps=1e-6,
        qk_norm="head",
    )


def _resize(config: LMConfig, *, d_model: int, d_ff: int, num_heads: int, **layers: int) -> LMConfig:
    """Give a model other sizes, its experts the same as its FFNs, and as many heads of every kind."""
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, d_model=d_model, d_ff=d_ff)
    return dataclasses.replace(
        config, d_model=d_model, d_ff=d_ff, num_heads=num_heads, num_kv_heads=num_heads, moe=moe, **layers
    )
