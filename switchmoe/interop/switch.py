"""Switch Transformers: an encoder and a decoder with T5's attention, every so many FFNs sparse, top-1.

Hugging Face's layer i is sparse if i % step == 1, or if step is 1, where step is the number of layers over
that of sparse layers. Ours are the last ones of super-blocks, so only steps of 1 and 2 (all that was
published) are the same places; others are refused.
"""

from typing import Any

from switchmoe.config import MoEConfig
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.family import Family
from switchmoe.interop.names import Named
from switchmoe.interop.settings import ACTIVATIONS, THEIR_ACTIVATIONS, Settings, refuse_different
from switchmoe.models import LMConfig


def _attention(ours: str, theirs: str) -> dict[str, Named]:
    """Name the four matrices of one attention."""
    return {
        f"{ours}.w_q_DHA": Named(f"{theirs}.q.weight", "(h a) d -> d h a"),
        f"{ours}.w_k_DNA": Named(f"{theirs}.k.weight", "(h a) d -> d h a"),
        f"{ours}.w_v_DNA": Named(f"{theirs}.v.weight", "(h a) d -> d h a"),
        f"{ours}.w_o_HAD": Named(f"{theirs}.o.weight", "d (h a) -> h a d"),
    }


def _stack(ours: str, theirs: str, feed_forward: int) -> dict[str, Named]:
    """Name what an encoder and a decoder both have; `feed_forward` is where the FFN is in their layers."""
    layer = theirs + ".block.{layer}.layer."
    mlp = f"{layer}{feed_forward}.mlp."
    expert = f"{mlp}experts.expert_{{expert}}."
    return {
        f"{ours}final_norm.scale_D": Named(f"{theirs}.final_layer_norm.weight", "d -> d"),
        f"{ours}positions.bias_UH": Named(
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "u h -> u h"
        ),
        f"{ours}attention_norm.scale_D": Named(f"{layer}0.layer_norm.weight", "d -> d"),
        **_attention(f"{ours}attention", f"{layer}0.SelfAttention"),
        f"{ours}feed_forward_norm.scale_D": Named(f"{layer}{feed_forward}.layer_norm.weight", "d -> d"),
        f"{ours}feed_forward.w_in_DF": Named(f"{mlp}wi.weight", "f d -> d f"),
        f"{ours}feed_forward.w_out_FD": Named(f"{mlp}wo.weight", "d f -> f d"),
        f"{ours}feed_forward.router_DE": Named(f"{mlp}router.classifier.weight", "e d -> d e"),
        f"{ours}feed_forward.w_in_EDF": Named(f"{expert}wi.weight", "f d -> d f"),
        f"{ours}feed_forward.w_out_EFD": Named(f"{expert}wo.weight", "d f -> f d"),
    }


_TABLE = {
    "embedding_VD": Named("shared.weight", "v d -> v d"),
    "head_DV": Named("lm_head.weight", "v d -> d v"),
    **_stack("encoder.", "encoder", 1),
    **_stack("", "decoder", 2),
    "cross_attention_norm.scale_D": Named("decoder.block.{layer}.layer.1.layer_norm.weight", "d -> d"),
    **_attention("cross_attention", "decoder.block.{layer}.layer.1.EncDecAttention"),
}


def _read(settings: Settings) -> LMConfig:
    """Turn their settings into ours; what they leave out has the value that transformers gives it."""
    settings.refuse_unless("router_bias", False)
    settings.refuse_unless("router_dtype", "float32")
    settings.refuse_unless("quantization_config")
    settings.refuse_unless("is_encoder_decoder", True)
    settings.refuse_unless("is_gated_act", False)  # transformers has no such layer any more
    settings.refuse_unless("feed_forward_proj", *ACTIVATIONS)  # what older files call dense_act_fn
    d_model, d_ff = settings.take("d_model"), settings.take("d_ff")
    layers = settings.take("num_layers")
    decoder_layers = settings.take("num_decoder_layers", default=layers)
    activation: Any = settings.activation("dense_act_fn", "relu")
    heads = settings.take("num_heads")
    tied = settings.take("tie_word_embeddings", default=True, kind=bool)
    return LMConfig(
        vocab_size=settings.take("vocab_size"),
        d_model=d_model,
        num_layers=decoder_layers,
        encoder_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=settings.take("d_kv"),
        d_ff=d_ff,
        moe=MoEConfig(
            d_model=d_model,
            d_ff=d_ff,
            num_experts=settings.take("num_experts"),
            router="switch",
            expert_capacity=settings.take("expert_capacity", default=64),
            drop_order="token",
            activation=activation,
            jitter=settings.take("router_jitter_noise", default=0.01, kind=float),
            balance_coef=settings.take("router_aux_loss_coef", default=0.001, kind=float),
            z_coef=settings.take("router_z_loss_coef", default=0.001, kind=float),
        ),
        moe_every=_sparse_step(settings, "num_sparse_decoder_layers", decoder_layers),
        encoder_moe_every=_sparse_step(settings, "num_sparse_encoder_layers", layers),
        positions="relative",
        relative_buckets=settings.take("relative_attention_num_buckets", default=32),
        relative_distance=settings.take("relative_attention_max_distance", default=128),
        scale_scores=False,
        scale_head=tied,
        norm_eps=settings.take("layer_norm_epsilon", default=1e-6, kind=float),
        activation=activation,
        dropout=settings.take("dropout_rate", default=0.1, kind=float),
        tie_embeddings=tied,
    )


def _sparse_step(settings: Settings, name: str, layers: int) -> int:
    sparse = settings.take(name)
    step = layers // sparse if sparse > 0 else layers
    if sparse <= 0 or step not in (1, 2) or layers % step:
        raise WeightsError(
            f"{settings.what} has {name}={sparse} of {layers} layers, so transformers makes layer 1 and "
            f"every {step} from there sparse; only all, or every other one of an even number, will do here."
        )
    return step


def _refuse_other(config: LMConfig, moe: MoEConfig) -> None:
    """Raise a WeightsError if transformers would compute another model."""
    encoder_every = config.encoder.moe_every
    ours = {
        "positions": config.positions,
        "qk_norm": config.qk_norm,
        "scale_scores": config.scale_scores,
        "scale_head": config.scale_head,
        "window": config.window,
        "num_kv_heads": config.num_kv_heads,
        "d_ff": config.d_ff,
        "gated": config.gated,
        "activation": config.activation,
    }
    theirs = ours | {
        "positions": "relative",
        "qk_norm": "none",
        "scale_scores": False,
        "scale_head": config.tie_embeddings,
        "window": None,
        "num_kv_heads": config.num_heads,
        "d_ff": moe.d_ff,
        "gated": False,
        "activation": moe.activation,
    }
    needed: dict[str, Any] = dict(router="switch", gated=False, shared_experts=0)
    needed |= dict(sequences_per_group=1, overflow="drop")
    if moe.drop_order == "priority":  # the other two are one, with one choice a token
        needed["drop_order"] = "token"
    ours |= {f"moe.{name}": getattr(moe, name) for name in needed} | {"moe_every": config.moe_every}
    theirs |= {f"moe.{name}": value for name, value in needed.items()}
    ours["encoder_moe_every"] = encoder_every
    theirs |= {"moe_every": min(config.moe_every, 2), "encoder_moe_every": min(encoder_every, 2)}
    refuse_different("Switch Transformer", ours, theirs)
    if moe.expert_capacity is None or moe.dispatch == "dropless" or moe.bias_step > 0:
        raise WeightsError(
            "Hugging Face's Switch Transformers have a fixed number of seats per expert and sequence; set "
            "moe.expert_capacity (theirs is 64 unless said), with moe.dispatch='gather' and moe.bias_step=0."
        )


def _write(config: LMConfig) -> dict[str, Any]:
    """Turn our settings into theirs.

    Raises:
      WeightsError: the model is no Switch Transformer as transformers has them.
    """
    moe = config.moe
    if moe is None or config.encoder_layers == 0:
        raise WeightsError(
            "this model can't be written as one of Hugging Face's Switch Transformers, which have an encoder "
            "and sparse layers."
        )
    _refuse_other(config, moe)
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.features_per_head,
        "d_ff": config.d_ff,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_sparse_encoder_layers": config.encoder_layers // config.encoder.moe_every,
        "num_sparse_decoder_layers": config.num_layers // config.moe_every,
        "num_heads": config.num_heads,
        "num_experts": moe.num_experts,
        "expert_capacity": moe.expert_capacity,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": moe.jitter,
        "router_aux_loss_coef": moe.balance_coef,
        "router_z_loss_coef": moe.z_coef,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dense_act_fn": THEIR_ACTIVATIONS[moe.activation],
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "add_router_probs": False,
        "use_cache": True,
    }


SWITCH = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    _TABLE,
    _read,
    _write,
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
)
