"""Mixtral, OLMoE, Qwen3-MoE, and Llama as their dense twin: their names, and their configurations both ways.

All have rotary positions, RMSNorm before attention and FFN, gated FFNs and no dropped tokens. They differ in
names, in norms of queries and keys, and in what happens to a token's weights: Mixtral makes them add up to 1,
the others if norm_topk_prob says so.
"""

import functools
from typing import Any, NamedTuple

from switchmoe.config import MoEConfig
from switchmoe.interop.decoder_names import (
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    OLMOE_NAMES,
    POSITION_BUFFERS,
    QWEN3_MOE_NAMES,
)
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.family import Family
from switchmoe.interop.names import Named
from switchmoe.interop.settings import THEIR_ACTIVATIONS, Settings, refuse_different
from switchmoe.models import LMConfig
from switchmoe.nn.attention import NormOfHeads


class _Kind(NamedTuple):
    """What distinguishes one of these families in its configuration.

    `experts` and `width` are their names for the number of experts and for an expert's hidden features.
    """

    name: str
    model_type: str
    norm_eps: float
    rope_theta: float
    qk_norm: NormOfHeads = "none"
    experts: tuple[str, ...] = ()
    width: str = "intermediate_size"
    renormalize: bool | None = None
    window: bool = False
    head_dim: bool = True
    balance_coef: float = 0.001
    max_positions: int = 4096


def _read(kind: _Kind, settings: Settings) -> LMConfig:
    """Turn their settings into ours; what they leave out has the value that transformers gives it."""
    for name in ("attention_bias", "mlp_bias"):
        settings.refuse_unless(name, False)
    for name in ("clip_qkv", "quantization_config"):
        settings.refuse_unless(name)
    settings.refuse_unless("attention_dropout", 0, 0.0)
    settings.refuse_unless("mlp_only_layers", [])
    d_model, heads = settings.take("hidden_size"), settings.take("num_attention_heads")
    activation: Any = settings.activation("hidden_act", "silu")
    d_ff, moe, every = settings.take("intermediate_size"), None, 1
    if kind.experts:
        every = settings.take("decoder_sparse_step", default=1) if kind.model_type == "qwen3_moe" else 1
        moe = MoEConfig(
            d_model=d_model,
            d_ff=settings.take(kind.width),
            num_experts=settings.take(*kind.experts),
            router="top_k",
            top_k=settings.take("num_experts_per_tok"),
            renormalize=_renormalizes(kind, settings),
            dispatch="dropless",
            activation=activation,
            gated=True,
            jitter=settings.take("router_jitter_noise", default=0.0, kind=float),
            balance_coef=settings.take("router_aux_loss_coef", default=kind.balance_coef, kind=float),
        )
    return LMConfig(
        vocab_size=settings.take("vocab_size"),
        d_model=d_model,
        num_layers=settings.take("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=settings.take("num_key_value_heads", default=heads),
        head_dim=_head_dim(kind, settings, d_model, heads),
        d_ff=d_ff,
        moe=moe,
        moe_every=every,
        rope_theta=settings.rope_theta(kind.rope_theta),
        window=_window(kind, settings),
        qk_norm=kind.qk_norm,
        norm_eps=settings.take("rms_norm_eps", default=kind.norm_eps, kind=float),
        activation=activation,
        gated=True,
        tie_embeddings=settings.take("tie_word_embeddings", default=False, kind=bool),
    )


def _head_dim(kind: _Kind, settings: Settings, d_model: int, heads: int) -> int | None:
    """Read the size of a head; None where it follows from the others, so that a model comes back the same."""
    size = settings.take("head_dim", default=None) if kind.head_dim else None
    return None if size is not None and size * heads == d_model else size


def _renormalizes(kind: _Kind, settings: Settings) -> bool:
    if kind.renormalize is not None:
        return kind.renormalize
    return settings.take("norm_topk_prob", default=False, kind=bool)


def _window(kind: _Kind, settings: Settings) -> int | None:
    if not kind.window:
        return None
    if kind.model_type == "qwen3_moe" and not settings.take("use_sliding_window", default=False, kind=bool):
        return None
    return settings.take("sliding_window", default=None)


def _write(kind: _Kind, config: LMConfig) -> dict[str, Any]:
    """Turn our settings into theirs.

    Raises:
      WeightsError: the model is none of this kind.
    """
    _refuse_other(kind, config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        # Both forms, since transformers before 4.57 reads the second and would take its default in silence.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "max_position_embeddings": kind.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind.head_dim:
        values["head_dim"] = config.features_per_head
    if kind.window:
        values["sliding_window"] = config.window
    if config.moe is None:
        return values | {"hidden_act": THEIR_ACTIVATIONS[config.activation]}
    moe = config.moe
    values |= {
        "hidden_act": THEIR_ACTIVATIONS[moe.activation],
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance_coef,
        kind.width: moe.d_ff,
    }
    values |= dict.fromkeys(kind.experts, moe.num_experts)
    if kind.renormalize is None:
        values["norm_topk_prob"] = moe.renormalize
    if kind.model_type == "qwen3_moe":
        values |= {"decoder_sparse_step": config.moe_every, "use_sliding_window": config.window is not None}
    if kind.model_type == "mixtral":
        values["router_jitter_noise"] = moe.jitter
    return values


def _refuse_other(kind: _Kind, config: LMConfig) -> None:
    ours = {
        "encoder_layers": config.encoder_layers,
        "positions": config.positions,
        "qk_norm": config.qk_norm,
        "scale_scores": config.scale_scores,
        "scale_head": config.scale_head,
        "window": config.window,
        "head_dim": config.features_per_head,
    }
    theirs = {
        "encoder_layers": 0,
        "positions": "rotary",
        "qk_norm": kind.qk_norm,
        "scale_scores": True,
        "scale_head": False,
        "window": config.window if kind.window else None,
        "head_dim": config.features_per_head if kind.head_dim else config.d_model // config.num_heads,
    }
    if config.moe is None or config.moe_every > 1:
        ours["gated"], theirs["gated"] = config.gated, True
    if (config.moe is None) == bool(kind.experts):
        raise WeightsError(f"Hugging Face's {kind.name} models are {'sparse' if kind.experts else 'dense'}.")
    if config.moe is not None:
        _add_sparse(kind, config, config.moe, ours, theirs)
    refuse_different(kind.name, ours, theirs)


def _add_sparse(kind: _Kind, config: LMConfig, moe: MoEConfig, ours: dict, theirs: dict) -> None:
    """Add what must be so in the sparse layers, and in the dense ones between them."""
    needed = dict(router="top_k", dispatch="dropless", gated=True, shared_experts=0, bias_step=0.0)
    if kind.renormalize is not None:
        needed["renormalize"] = kind.renormalize
    ours |= {f"moe.{name}": getattr(moe, name) for name in needed}
    theirs |= {f"moe.{name}": value for name, value in needed.items()}
    ours["moe_every"] = config.moe_every
    theirs["moe_every"] = config.moe_every if kind.model_type == "qwen3_moe" else 1
    if kind.width == "intermediate_size":
        return
    if config.moe_every > 1:
        ours["activation"], theirs["activation"] = config.activation, moe.activation


_MIXTRAL = _Kind(
    "Mixtral",
    "mixtral",
    norm_eps=1e-5,
    rope_theta=1e6,
    experts=("num_local_experts",),
    renormalize=True,
    window=True,
    max_positions=131072,
)
_OLMOE = _Kind(
    "OLMoE",
    "olmoe",
    norm_eps=1e-5,
    rope_theta=1e4,
    qk_norm="full",
    experts=("num_experts", "num_local_experts"),
    head_dim=False,
    balance_coef=0.01,
)
_QWEN3_MOE = _Kind(
    "Qwen3-MoE",
    "qwen3_moe",
    norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm="head",
    experts=("num_experts", "num_local_experts"),
    width="moe_intermediate_size",
    window=True,
    max_positions=32768,
)
_LLAMA = _Kind("Llama", "llama", norm_eps=1e-6, rope_theta=1e4)


def _family(kind: _Kind, architecture: str, table: dict[str, Named]) -> Family:
    return Family(
        kind.model_type,
        architecture,
        table,
        functools.partial(_read, kind),
        functools.partial(_write, kind),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        noise=POSITION_BUFFERS,
    )


MIXTRAL = _family(_MIXTRAL, "MixtralForCausalLM", MIXTRAL_NAMES)
OLMOE = _family(_OLMOE, "OlmoeForCausalLM", OLMOE_NAMES)
QWEN3_MOE = _family(_QWEN3_MOE, "Qwen3MoeForCausalLM", QWEN3_MOE_NAMES)
LLAMA = _family(_LLAMA, "LlamaForCausalLM", LLAMA_NAMES)
